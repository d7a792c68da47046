"""The demo: the unquantized model and three quantizers through the real `lmms-eval` command; table and pictures.

Everything shown is read from the files lmms-eval wrote, so the table is what those runs measured.
"""

import json
import math
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_plugin import harness_log
from lmms_plugin.analysis import logs
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.demo import pictures
from lmms_plugin.demo.pace import DemoWatcher, Pace
from lmms_plugin.quant_backends import GGUF, get, model_name
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.report import building
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.utils.files import replace_text
from lmms_plugin.utils.messages import command_line, counted
from lmms_plugin.utils.processes import guard, installed

METHODS = ("none", "rtn", "hqq", "awq")
GGUF_TYPES = ("Q8_0", "Q5_0", "Q4_0")
"""Types of GGUF tensors that are run beside round to nearest of as many bits as the first and the last have."""
CLEAN, SHIFTED, SEVERITY = "shapes_rec", "shapes_shift", 3
# Chosen for variety before their results were known: ImageNet-C's first noise, blur, weather and digital corruption.
QUICK = ("gaussian_noise", "defocus_blur", "snow", "contrast")
COLUMNS = ("acc@0.5", "mean_iou", "ece")
PICTURED = (CLEAN, f"{SHIFTED}_gaussian_noise_{SEVERITY}")
HEADINGS = ("model", "bits per weight", *(f"{column} {when}" for when in ("clean", "shifted") for column in COLUMNS))
_PICTURES = 12
_POLL_SECONDS = 0.3
# Each takes 1.4 GB of memory.
_AT_ONCE = 2


ShowTable = Callable[[Sequence[str], Sequence[Sequence[str]], str], None]
"""Function that shows headings, rows of one cell per heading, and a caption."""


@dataclass(frozen=True)
class DemoRun:
    """One finished run of lmms-eval: the model's name, its command, its results file and the file's content."""

    model: str
    command: tuple[str, ...]
    file: Path
    results: dict[str, Any]

    def clean(self, name: str) -> float:
        """Return a value of lmms-eval's results table for clean scenes; NaN if missing."""
        return self._metric(CLEAN, name)

    def shifted(self, name: str) -> float:
        """Return the mean of a value over the corruptions that were run; NaN if one is missing."""
        return math.fsum(self._metric(task, name) for task in self.corrupted) / len(self.corrupted)

    @property
    def corrupted(self) -> list[str]:
        """Return the tasks of the corruptions that were run."""
        return [task for name in SHIFTS if (task := f"{SHIFTED}_{name}_{SEVERITY}") in self.results["n-samples"]]

    def _metric(self, task: str, name: str) -> float:
        return float(self.results["results"][task].get(f"{name},none", math.nan))

    @property
    def bits_per_weight(self) -> float:
        """Return bits per quantized weight, scales and zero-points included; of all weights where none is quantized."""
        return float(self.results["throughput"]["avg_bits_per_weight"])

    def records(self, task: str) -> list[dict[str, Any]]:
        """Return the logged grounding records of one task, in the order of its documents."""
        path = logs.log_of(self.file, task)
        return [json.loads(line)["mean_iou"] for line in path.read_text(encoding="utf-8").splitlines()]


def run(
    output: Path,
    bits: int,
    watch: Callable[[int], DemoWatcher],
    show: ShowTable,
    limit: int | None = None,
    *,
    full: bool = False,
    gguf: bool = False,
) -> list[DemoRun]:
    """Run all methods, show the table, and write `report.html`, `report.md` and pictures into the folder `output`.

    Args:
        output: Folder to write into; each run has a sub-folder with lmms-eval's own files and its log.
        bits: Bits per weight of the quantized language model.
        watch: Function from the number of runs to the watcher of their progress.
        show: Function that shows headings, rows and caption of the table.
        limit: Expressions per task, for quick trials; None for all.
        full: Whether to run all corruptions instead of one of each kind.
        gguf: Whether to run GGUF files in llama.cpp beside round to nearest, instead of the methods.

    Raises:
        ValueError: A method cannot do these bits, before anything is run.
        ImportError: GGUF is asked for, and the extra `gguf` is not installed.
        RuntimeError: A run left no results; names its log (lmms-eval exits with 0 after an error).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    for method in METHODS[1:]:
        get(method).check(QuantPlan.from_arguments(bits=bits))
    # A folder of their own: the page shows these runs and no earlier ones.
    folder = output / "runs" / time.strftime("%Y%m%d_%H%M%S")
    if gguf:
        commands = _gguf_commands(folder, limit, full=full)
    else:
        commands = {model_name(method): command_of(method, folder, bits, limit, full=full) for method in METHODS}
    runs = _evaluate(commands, folder, watch)
    show(HEADINGS, [cells(one) for one in runs], scope(runs[0]))
    images = [pictures.sheet(runs, task, output / f"{task}.png") for task in PICTURED]
    replace_text(output / "report.md", report(runs, images, limit))
    page = output / "report.html"
    settings = MeasurementSettings(resamples=building.RESAMPLES, workers=building.default_workers())
    list(building.build(folder, page, settings, title="Embedded demo", figures=None, pictures=_PICTURES))
    print(f"Report: {page}, {output / 'report.md'}; pictures: {', '.join(str(path) for path in images)}")
    return runs


def command_of(method: str, folder: Path, bits: int, limit: int | None, *, full: bool) -> tuple[str, ...]:
    """Return the command of one method, as a tuple of arguments.

    Args:
        method: Name of the quantizer.
        folder: Folder with a folder of results per model.
        bits: Bits per weight of the language model.
        limit: Expressions per task; None for all.
        full: Whether to run all corruptions instead of a few.
    """
    arguments = "pretrained=demo" if method == "none" else f"pretrained=demo,bits={bits}"
    return _command(method, arguments, folder / model_name(method), limit, full=full)


def _command(method: str, arguments: str, output: Path, limit: int | None, *, full: bool) -> tuple[str, ...]:
    tasks = (CLEAN, SHIFTED) if full else (CLEAN, *(f"{SHIFTED}_{name}_{SEVERITY}" for name in QUICK))
    asked = ("--model", model_name(method), "--model_args", arguments, "--tasks", ",".join(tasks))
    kept = ("--batch_size", "64", "--log_samples", "--output_path", str(output))
    return ("lmms-eval", *asked, *kept, *(("--limit", str(limit)) if limit is not None else ()))


def _gguf_commands(folder: Path, limit: int | None, *, full: bool) -> dict[str, tuple[str, ...]]:
    """Return the commands of GGUF files and of what stands beside them, by the names of their rows."""
    for library in ("gguf", "xllamacpp"):
        require(library, extra="gguf", user="the demo in llama.cpp")
    rows = {model_name("none"): ("none", "pretrained=demo")}
    for kind in GGUF_TYPES:
        # One thread, as the other models have.
        rows[f"{model_name(GGUF)}_{kind}"] = (GGUF, f"pretrained=demo,type={kind},threads=1")
    for bits in (8, 4):
        rows[f"{model_name('rtn')}_{bits}"] = ("rtn", f"pretrained=demo,bits={bits},group_size=32,symmetric=True")
    return {
        name: _command(method, arguments, folder / name, limit, full=full) for name, (method, arguments) in rows.items()
    }


def _evaluate(
    commands: Mapping[str, tuple[str, ...]], folder: Path, watch: Callable[[int], DemoWatcher]
) -> list[DemoRun]:
    """Run commands by model name, two at once where there are two processors; the end of this process ends all.

    Raises:
        RuntimeError: A run left no results.
    """
    # One thread each: runs do not compete, and results do not depend on the number of processors.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # The last takes longest because it calibrates.
    waiting = deque(reversed(list(commands)))
    running: dict[str, tuple[subprocess.Popen[bytes], Pace, harness_log.Followed]] = {}
    done: dict[str, DemoRun] = {}
    at_once = min(_AT_ONCE, building.default_workers())
    with watch(len(commands)) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    model = waiting.popleft()
                    log = harness_log.Followed(folder / model / "log.txt")
                    log.file.parent.mkdir(parents=True)
                    program, *arguments = commands[model]
                    pace = progress.start(model, commands[model])
                    process = guard.start([installed.command(program), *arguments], log.file, environment=environment)
                    running[model] = (process, pace, log)
                time.sleep(_POLL_SECONDS)
                for model, (process, pace, log) in list(running.items()):
                    over = process.poll() is not None
                    progress.see(pace, log.share())
                    if over:
                        guard.end(process)
                        done[model] = _finished(model, commands[model], log.file, process.returncode)
                        del running[model]
                        progress.end(pace)
                progress.tick()
        finally:
            for process, *_ in running.values():
                guard.end(process)
    return [done[model] for model in commands]


def _finished(model: str, command: tuple[str, ...], log: Path, status: int) -> DemoRun:
    try:
        files = [] if status else logs.find(log.parent)
    except ValueError:
        files = []
    if not files:
        told = harness_log.failure(log.read_text(encoding="utf-8", errors="replace"), status)
        raise RuntimeError(f"{model}: {told}; its log: {log}")
    return DemoRun(model, command, files[0], logs.table(files[0]))


def cells(one: DemoRun) -> list[str]:
    """Return a run's row of the table."""
    numbers = [number(name) for number in (one.clean, one.shifted) for name in COLUMNS]
    return [one.model, f"{one.bits_per_weight:.2f}", *(f"{number:.3f}" for number in numbers)]


def scope(one: DemoRun) -> str:
    """Describe the scope: the number of expressions and the corruptions."""
    names = [task.removeprefix(f"{SHIFTED}_").removesuffix(f"_{SEVERITY}") for task in one.corrupted]
    which = ", ".join(names) if len(names) < len(SHIFTS) else f"all {len(names)} corruptions"
    expressions = one.results["n-samples"][CLEAN]["effective"]
    return f"{counted(expressions, 'expression')}; shifted: mean over {which} at severity {SEVERITY}."


def report(runs: Sequence[DemoRun], images: Sequence[Path], limit: int | None) -> str:
    """Return the text of `report.md`: scope, table, pictures and commands."""
    first = "expression" if limit == 1 else f"{limit} expressions"
    warning = ["", f"**Only the first {first} of each task {'was' if limit == 1 else 'were'} used.**"] if limit else []
    rows = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, runs)]
    table = [f"| {' | '.join(row)} |" for row in rows]
    shown = [f"![Predicted (red) and true (green) boxes: {path.stem}]({path.name})" for path in images]
    commands = ["```", *(command_line(one.command) for one in runs), "```"]
    head = [
        "# Embedded demo",
        "",
        scope(runs[0]),
        "Synthetic scenes: the numbers stand for nothing beyond themselves.",
        *warning,
    ]
    return "\n".join([*head, "", *table, "", *shown, "", "## Commands", "", *commands, ""])
