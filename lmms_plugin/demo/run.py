"""The demo job: the unquantized model and three quantizers through the real `lmms-eval` command; table and pictures.

Everything shown is read back from the files lmms-eval wrote, so the table is what those runs measured.
"""

import json
import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmms_plugin import installed
from lmms_plugin.demo import pictures
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.plan import QuantPlan
from lmms_plugin.reliability import Settings
from lmms_plugin.report import building

METHODS = ("none", "rtn", "hqq", "awq")
CLEAN, SHIFTED = "shapes_rec", "shapes_shift"
COLUMNS = ("acc@0.5", "mean_iou", "ece")
PICTURED = (CLEAN, "shapes_shift_gaussian_noise_3")
_PICTURES = 12
HEADINGS = ("model", "bits per weight", *(f"{column} {when}" for when in ("clean", "shifted") for column in COLUMNS))


@dataclass(frozen=True)
class Run:
    """One finished run of lmms-eval: the model's name, its command, its results file and what that holds."""

    model: str
    command: tuple[str, ...]
    file: Path
    results: dict[str, Any]

    def metric(self, task: str, name: str) -> float:
        """A number of lmms-eval's results table; NaN where it is missing."""
        return float(self.results["results"][task].get(f"{name},none", math.nan))

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales and zero-points counted; of all weights where none is quantized."""
        return float(self.results["throughput"]["avg_bits_per_weight"])

    def records(self, task: str) -> list[dict[str, Any]]:
        """The logged grounding records of one task, in the order of its documents."""
        # The folder may hold older runs; files of one run share their date.
        path = self.file.with_name(self.file.name.replace("_results.json", f"_samples_{task}.jsonl"))
        return [json.loads(line)["mean_iou"] for line in path.read_text(encoding="utf-8").splitlines()]


def run(output: Path, bits: int, limit: int | None = None) -> list[Run]:
    """Run all methods, print the table, and write `report.html`, `report.md` and pictures into the folder `output`.

    Args:
        output: folder to write into; each run has a sub-folder with lmms-eval's own files and its log.
        bits: bits per weight of the quantized language model.
        limit: expressions per task, for trying things out; None for all.

    Raises:
        ValueError: if a method cannot do these bits, before anything is run.
        RuntimeError: if a run left no results; names its log (lmms-eval exits with 0 after an error).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    for method in METHODS[1:]:
        get(method).check(QuantPlan.from_arguments(bits=bits))
    runs = [_evaluate(method, output, bits, limit) for method in METHODS]
    Console().print(_table(runs))
    images = [pictures.sheet(runs, task, output / f"{task}.png") for task in PICTURED]
    (output / "report.md").write_text(_report(runs, images, limit), encoding="utf-8")
    page = output / "report.html"
    settings = Settings(resamples=building.RESAMPLES, workers=building.default_workers())
    list(building.build(output, page, settings, title="Embedded demo", figures=None, pictures=_PICTURES))
    print(f"Report: {page}, {output / 'report.md'}; pictures: {', '.join(str(path) for path in images)}")
    return runs


def _evaluate(method: str, output: Path, bits: int, limit: int | None) -> Run:
    model, folder = f"quant_{method}", output / f"quant_{method}"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = "pretrained=demo" if method == "none" else f"pretrained=demo,bits={bits}"
    command = ["lmms-eval", "--model", model, "--model_args", arguments, "--tasks", f"{CLEAN},{SHIFTED}"]
    command += ["--batch_size", "64", "--log_samples", "--output_path", str(folder)]
    command += ["--limit", str(limit)] if limit is not None else []
    print(f"$ {' '.join(command)}", flush=True)
    started = time.time()
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(
            [installed.command(command[0]), *command[1:]], stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    fresh = [path for path in folder.rglob("*_results.json") if path.stat().st_mtime >= started - 1]
    if len(fresh) != 1:
        errors = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "Error" in line]
        raise RuntimeError(f"{model} left no results, see {log}{': ' + errors[-1] if errors else ''}")
    results = json.loads(fresh[0].read_text(encoding="utf-8"))
    print(f"  {time.time() - started:.0f} s", flush=True)
    return Run(model, tuple(command), fresh[0], results)


def _cells(one: Run) -> list[str]:
    numbers = [one.metric(task, name) for task in (CLEAN, SHIFTED) for name in COLUMNS]
    return [one.model, f"{one.bits_per_weight:.2f}", *(f"{number:.3f}" for number in numbers)]


def _table(runs: Sequence[Run]) -> Table:
    table = Table(title="Embedded demo: unquantized model against quantized language model")
    for heading in HEADINGS:
        named = heading == "model"
        table.add_column(heading, justify="left" if named else "right", no_wrap=named, min_width=10 if named else None)
    for one in runs:
        table.add_row(*_cells(one))
    return table


def _report(runs: Sequence[Run], images: Sequence[Path], limit: int | None) -> str:
    samples = runs[0].results["n-samples"]
    cells = [task for task in samples if task.startswith(SHIFTED)]
    scope = f"{samples[CLEAN]['effective']} expressions; shifted: mean over {len(cells)} corruptions at severity 3."
    warning = ["", f"**Only the first {limit} expressions of each task were used.**"] if limit else []
    rows = [HEADINGS, ["---"] * len(HEADINGS), *map(_cells, runs)]
    table = [f"| {' | '.join(row)} |" for row in rows]
    shown = [f"![Predicted (red) and true (green) boxes: {path.stem}]({path.name})" for path in images]
    commands = ["```", *(" ".join(one.command) for one in runs), "```"]
    head = [
        "# Embedded demo",
        "",
        scope,
        "Synthetic scenes: the numbers stand for nothing beyond themselves.",
        *warning,
    ]
    return "\n".join([*head, "", *table, "", *shown, "", "## Commands", "", *commands, ""])
