"""Start-up: what this package adds to lmms-eval's own time.

    python -m bench.startup [--repeats N] [--json FILE]

Every measurement is a process of its own.

    list    `lmms-eval --tasks list`, with this package's entry point and, as the baseline, without it: wall clock
    import  `lmms-eval --model quant_none --tasks shapes_rec --limit 1` under ``-X importtime``: the baseline is what
            lmms-eval's listing of tasks and a transformers model import anyway; ours is that and the modules that
            only this package brings (its own and the libraries that nothing else asks for)

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
from pathlib import Path

from bench.reporting import Row, machine, write

IMPORTED = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$")
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


def imports(log: str) -> dict[str, float]:
    """Return module -> seconds that its own body took, from a log of ``-X importtime``."""
    found: dict[str, float] = {}
    for line in log.splitlines():
        match = IMPORTED.match(line)
        if match:
            found[match[2]] = found.get(match[2], 0.0) + int(match[1]) / 1e6
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
    heaviest: dict[str, float] = {}
    for _ in range(repeats):
        common = imports(run(WITHOUT_PLUGIN + COMMON + MAIN, "--tasks", "list", importtime=True)[1])
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["--model", "quant_none", "--model_args", "pretrained=demo", "--tasks", "shapes_rec"]
            arguments += ["--limit", "1", "--output_path", folder]
            ours = imports(run(MAIN, *arguments, importtime=True)[1])
        own = sum(seconds for name, seconds in ours.items() if name.split(".")[0] == "lmms_plugin")
        brought = _brought(ours, common)
        heaviest = brought
        shares.append((sum(common.values()), sum(brought.values()), own))
    common_s, brought_s, own_s = (statistics.median(column) for column in zip(*shares, strict=True))
    print("brought by us:", ", ".join(f"{k} {1000 * v:.0f} ms" for k, v in _largest(heaviest)))
    return [
        {
            "case": "import",
            "ratio": common_s / (common_s + brought_s),
            "seconds": common_s + brought_s,
            "baseline_seconds": common_s,
            "own_modules_seconds": own_s,
        }
    ]


def _brought(ours: dict[str, float], common: dict[str, float]) -> dict[str, float]:
    """Seconds by distribution of what a run imports beyond the common part: transformers' lazy modules are not ours."""
    known = {name.split(".")[0] for name in common}
    totals: dict[str, float] = {}
    for name, seconds in ours.items():
        package = name.split(".")[0]
        if package not in known:
            totals[package] = totals.get(package, 0.0) + seconds
    return totals


def _largest(totals: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(totals.items(), key=lambda item: -item[1])[:6]


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
