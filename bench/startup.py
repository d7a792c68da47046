"""Start-up: what this package adds to lmms-eval's own time.

    python -m bench.startup [--repeats N] [--json FILE]

Every measurement is a process of its own.

    list    `lmms-eval --tasks list`, with this package's entry point and, as the baseline, without it: wall clock
    import  `lmms-eval --model quant_none --tasks shapes_rec --limit 1` under ``-X importtime``: the baseline is what
            lmms-eval's listing of tasks and a transformers model import anyway; ours is that and what is imported
            on behalf of this package beyond it (its own modules, and libraries that it was the first to ask for)

A ratio is baseline over ours: 1 means that nothing was added, 0.9 that start-up takes a tenth longer.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.reporting import Row, machine, write

PACKAGE = "lmms_plugin"
IMPORTED = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|( +)(\S+)$")
WITHOUT_PLUGIN = """
from importlib.metadata import EntryPoints, entry_points
import lmms_eval.models.registry_v2 as registry
others = EntryPoints(e for e in entry_points(group="lmms_eval.models") if e.name != "lmms_plugin")
registry.entry_points = lambda: others
"""
MAIN = (
    "import sys; from lmms_eval.__main__ import cli_evaluate; sys.argv = ['lmms-eval', *sys.argv[1:]]; cli_evaluate()"
)
# What any chat model of lmms-eval imports: the harness, torch, transformers' loading and data.
COMMON = """
import lmms_eval.__main__, lmms_eval.evaluator, lmms_eval.tasks, lmms_eval.api.model
import accelerate, datasets, torch, torchvision
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedModel
"""


def run(code: str, *arguments: str, importtime: bool = False) -> tuple[float, str]:
    """Run Python code in a new process; return seconds and what it wrote to standard error."""
    command = [sys.executable, *(["-X", "importtime"] if importtime else []), "-c", code, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stderr


class Import(NamedTuple):
    """One line of ``-X importtime``.

    Attributes:
        name: Of the module.
        seconds: Its own body took, without what it imports.
        asked_by_us: Whether it or a module that was importing it belongs to this package.
    """

    name: str
    seconds: float
    asked_by_us: bool


def imports(log: str) -> list[Import]:
    """Read a log of ``-X importtime``, in which a module comes after all that it imports, which is indented."""
    matches = [match for line in log.splitlines() if (match := IMPORTED.match(line))]
    found: list[Import] = []
    importing: dict[int, bool] = {}
    for match in reversed(matches):
        depth = len(match[2])
        above = [ours for level, ours in importing.items() if level < depth]
        ours = match[3].split(".")[0] == PACKAGE or any(above)
        importing = {level: value for level, value in importing.items() if level < depth} | {depth: ours}
        found.append(Import(match[3], int(match[1]) / 1e6, ours))
    return found


def listing(repeats: int) -> Row:
    """Time to list all tasks, the two ways in turn."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        times["theirs"].append(run(WITHOUT_PLUGIN + MAIN, "--tasks", "list")[0])
        times["ours"].append(run(MAIN, "--tasks", "list")[0])
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "theirs"))
    return {"case": "list", "ratio": theirs / ours, "seconds": ours, "baseline_seconds": theirs}


def importing(repeats: int) -> list[Row]:
    """Import time of a run on the demo, and of that the part of this package's own modules."""
    shares: list[tuple[float, float, float]] = []
    brought: list[Import] = []
    for _ in range(repeats):
        common = imports(run(WITHOUT_PLUGIN + COMMON + MAIN, "--tasks", "list", importtime=True)[1])
        known = {module.name for module in common}
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--model", "quant_none", "--model_args", "pretrained=demo", "--tasks", "shapes_rec"]
            arguments += ["--limit", "1", "--output_path", folder]
            whole = imports(run(MAIN, *arguments, importtime=True)[1])
        brought = [module for module in whole if module.asked_by_us and module.name not in known]
        own = [module for module in brought if module.name.split(".")[0] == PACKAGE]
        shares.append((_sum(common), _sum(brought), _sum(own)))
    common_s, brought_s, own_s = (statistics.median(column) for column in zip(*shares, strict=True))
    packages = sorted({module.name.split(".")[0] for module in brought})
    by_package = {name: _sum([m for m in brought if m.name.split(".")[0] == name]) for name in packages}
    print("on our behalf:", ", ".join(f"{name} {1000 * by_package[name]:.0f} ms" for name in _largest(by_package)))
    return [
        {
            "case": "import",
            "ratio": common_s / (common_s + brought_s),
            "seconds": common_s + brought_s,
            "baseline_seconds": common_s,
            "own_modules_seconds": own_s,
        }
    ]


def _sum(modules: Sequence[Import]) -> float:
    return sum(module.seconds for module in modules)


def _largest(totals: dict[str, float]) -> list[str]:
    return sorted(totals, key=lambda name: -totals[name])[:6]


def main() -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    print(machine())
    rows = [listing(options.repeats), *importing(options.repeats)]
    for row in rows:
        print(f"{row['case']:<8}{row['seconds']:8.2f} s{row['baseline_seconds']:8.2f} s  ratio {row['ratio']:.3f}")
    print(f"modules of this package: {1000 * rows[1]['own_modules_seconds']:.0f} ms")
    write(options.json, rows)


if __name__ == "__main__":
    main()
