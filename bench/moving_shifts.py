"""What do shifts that move boxes cost the embedded demo, unquantized and quantized, on all of its expressions?

    python -m bench.moving_shifts --output moving_shifts [--models none rtn4 rtn3] [--benchmark] [--threads N]
    python -m bench.moving_shifts --output moving_shifts --table

Each model is asked `shapes_rec` and every shift of `docs/moving_shifts.md` at severities 1, 3 and 5, and with
`--benchmark` also what the 75 cells of `shapes_c` have besides, for mPC and rPC. Runs are those of lmms-eval's
evaluator, in this process; a rerun does only what is missing, and `--table` runs nothing. Intervals are of 95 %, over
images; differences between models are paired image by image.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path

from bench.evaluating import Evaluator
from bench.reporting import markdown
from lmms_plugin.analysis import groups
from lmms_plugin.analysis.comparison import Change, compare
from lmms_plugin.analysis.logs import LoggedRun, read_one
from lmms_plugin.analysis.measure import MeasurementSettings, measure
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.shifts.benchmark import FIFTEEN
from lmms_plugin.shifts.image.moving import MOVING
from lmms_plugin.shifts.severities import SEVERITIES

TASK, ACCURACY = "shapes_rec", "acc@0.5"
SHOWN = (1, 3, 5)
MOVED = tuple(product(MOVING, SHOWN))
BENCHMARK = tuple(product(FIFTEEN, SEVERITIES))
COMMON = "pretrained=demo,batch_size=64"
MODELS: Mapping[str, tuple[str, str]] = {
    "none": ("quant_none", COMMON),
    "rtn4": ("quant_rtn", f"{COMMON},bits=4"),
    "rtn3": ("quant_rtn", f"{COMMON},bits=3"),
}


def task_of(shift: str, severity: int) -> str:
    """Name of a cell's task."""
    return f"shapes_shift_{shift}_{severity}"


REST = "rest"
PARTS: Mapping[str, tuple[str, ...]] = {
    "clean": (TASK,),
    **{str(severity): tuple(task_of(shift, severity) for shift in MOVING) for severity in SHOWN},
    REST: tuple(task_of(*cell) for cell in BENCHMARK if cell not in MOVED),
}
"""Tasks of each run of a model, by the end of its folder's name; the last are asked with `--benchmark`."""


def folder_of(output: Path, model: str, part: str) -> Path:
    """Folder of a run."""
    return output / f"{model}-{part}"


def finished(output: Path) -> dict[str, LoggedRun]:
    """The runs that there are, those of one model as one."""
    found = {}
    for model in MODELS:
        there = [folder for part in PARTS if (folder := folder_of(output, model, part)).exists()]
        if there:
            found[model] = reduce(_joined, map(read_one, there))
    return found


def _joined(one: LoggedRun, other: LoggedRun) -> LoggedRun:
    return replace(one, tasks={**one.tasks, **other.tasks}, results={**one.results, **other.results})


def _only(run: LoggedRun, tasks: Collection[str]) -> LoggedRun:
    return replace(run, tasks={task: records for task, records in run.tasks.items() if task in tasks})


def table(runs: Mapping[str, LoggedRun], settings: MeasurementSettings) -> Iterator[str]:
    """Accuracy of the first model under each shift, of others the difference from it, in markdown."""
    shown = {TASK: "none"} | {task_of(*cell): f"`{cell[0]}` {cell[1]}" for cell in MOVED}
    (name, first), *others = [(name, _only(run, shown)) for name, run in runs.items()]
    values = {one.task: one for one in measure(first, settings) if one.metric == ACCURACY}
    changes = {other: _changes(first, run, settings) for other, run in others}
    lines = []
    for task in (task for task in shown if task in values):
        one, told = values[task], first.results[task]
        unmoved, asked = (_share(told, metric) for metric in (f"{ACCURACY}_unmoved", "shifted_rate"))
        accuracy = f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
        lost = (_points(changes[other].get(task)) for other, _ in others)
        lines.append((shown[task], accuracy, *lost, unmoved, asked))
    heads = ("shift", name, *(f"{other} - {name}, points" for other, _ in others), f"{name}, unmoved", "asked")
    yield from markdown(heads, lines)


def _changes(first: LoggedRun, other: LoggedRun, settings: MeasurementSettings) -> dict[str, Change]:
    both = first.tasks.keys() & other.tasks.keys()
    found = compare(_only(first, both), _only(other, both), settings)
    return {one.task: one for one in found.changes if one.metric == ACCURACY}


def _points(change: Change | None) -> str:
    if change is None:
        return ""
    found = change.difference
    value, low, high = (f"{100 * each:+z.1f}" for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _share(told: Mapping[str, float], metric: str) -> str:
    value = told.get(f"{metric},none")
    return "" if value is None else f"{value:.2f}"


def robustness(runs: Mapping[str, LoggedRun], settings: MeasurementSettings) -> Iterator[str]:
    """MPC and rPC of the models that were asked all of `shapes_c`, in markdown."""
    tasks = (TASK, *(task_of(*cell) for cell in BENCHMARK))
    lines = []
    for name, run in runs.items():
        if not set(tasks) <= run.tasks.keys():
            continue
        measured = groups.measure(_only(run, tasks).tasks.values(), settings).groups
        of = {condition: group for (_, condition), group in measured.items()}
        clean, shifted = of[CLEAN], of["shifted"]
        low, high = shifted.interval("accuracy")
        mean, alone = shifted.of("accuracy"), clean.of("accuracy")
        told = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        unmoved = sum(
            run.results[task].get(f"{ACCURACY}_unmoved,none", run.results[task][f"{ACCURACY},none"])
            for task in tasks[1:]
        )
        lines.append((name, f"{alone:.3f}", told, f"{mean / alone:.3f}", f"{unmoved / len(tasks[1:]):.3f}"))
    if lines:
        yield ""
        yield from markdown(("model", "clean", "mPC", "rPC", "mPC, unmoved"), lines)


def main() -> None:
    """Run what is missing, and print the tables of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--benchmark", action="store_true", help="all 75 cells of mPC, too")
    parser.add_argument("--limit", type=int, help="expressions per task; only for trying things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    evaluator = None
    for model, part in product(options.models, PARTS):
        if part == REST and not options.benchmark:
            continue
        folder = folder_of(options.output, model, part)
        if not folder.exists() and not options.table:
            evaluator = evaluator or Evaluator(options.threads)
            evaluator.run(*MODELS[model], PARTS[part], limit=options.limit, folder=folder)
            print(folder.name, flush=True)
    runs = finished(options.output)
    if not runs:
        raise SystemExit(f"no run is in {options.output}")
    settings = MeasurementSettings()
    print("\n".join([*table(runs, settings), *robustness(runs, settings)]))


if __name__ == "__main__":
    main()
