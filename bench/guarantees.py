"""Which guarantees that are chosen at 16 bits on clean images hold at 8, 4 and 3 bits, clean and under each shift?

    python -m bench.guarantees --output guarantees [--risk 0.05] [--threads N]
    python -m bench.guarantees --output guarantees --table

Runs of lmms-eval's evaluator, in this process, on the embedded demo: one of each model on `shapes_rec_dev`, whose
scenes are in no other task, on clean scenes, and on these under each family of shifts; a rerun does only what is
missing. The threshold is chosen on half of the scenes of `shapes_rec_dev` by the unquantized model, in bfloat16, and
judged on the other half and on all other tasks, of every model. Images count alike, whose bounds are narrower than
those of answers. All runs keep features, so that thresholds are also chosen with the images reweighed by them, and by
confidences.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from bench.evaluating import Evaluator
from bench.reporting import markdown
from lmms_plugin.analysis.guarantees.covariate import Covariate
from lmms_plugin.analysis.guarantees.guarantee import guarantee
from lmms_plugin.analysis.guarantees.guarantee_results import GuaranteeSettings, JudgedCell, RunGuarantee
from lmms_plugin.analysis.guarantees.guarantee_sentences import sentences
from lmms_plugin.analysis.logs import LoggedRun, read_one
from lmms_plugin.selector.kept_features import RunFeatures

DEV, CLEAN = "shapes_rec_dev", "shapes_rec"
SEVERITY = 3
SHIFTS: Mapping[str, tuple[str, ...]] = {
    "corruptions": ("gaussian_noise", "defocus_blur", "snow", "fog", "contrast", "jpeg_compression"),
    "moving": ("crop", "horizontal_flip", "quarter_turn", "rotation", "perspective"),
    "language": ("keyboard_typos", "dropped_words", "reordered_words", "synonyms", "paraphrase"),
}
"""Shifts by family: of the corruptions noise, blur, two of weather and two digital ones, of the others five of ten."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "dev": (DEV,),
    "clean": (CLEAN,),
    **{family: tuple(f"shapes_shift_{name}_{SEVERITY}" for name in names) for family, names in SHIFTS.items()},
}
"""Tasks of one run."""
TASKS = tuple(task for tasks in PARTS.values() for task in tasks)
COMMON = "pretrained=demo,dtype=bfloat16,batch_size=64"
MODELS: Mapping[str, tuple[str, str]] = {
    "16 bits": ("quant_none", COMMON),
    **{f"{bits} bits": ("quant_rtn", f"{COMMON},bits={bits}") for bits in (8, 4, 3)},
}


def order() -> Iterator[tuple[str, str]]:
    """Models and parts, those of which most is to be learned first: scenes to choose anew on come last."""
    first, *others = MODELS
    yield from ((first, part) for part in PARTS)
    yield from ((name, part) for name in reversed(others) for part in PARTS if part != "dev")
    yield from ((name, "dev") for name in reversed(others))


def finished(folder: Path) -> dict[str, LoggedRun]:
    """The models that there are runs of, each with the tasks of all of its parts as those of one run."""
    found: dict[str, LoggedRun] = {}
    for name in MODELS:
        parts = [read_one(place) for part in PARTS if (place := folder / _named(name) / part).exists()]
        if parts:
            tasks = {task: records for run in parts for task, records in run.tasks.items()}
            found[name] = replace(parts[0], tasks=tasks)
    return found


def _named(name: str) -> str:
    return name.replace(" ", "_")


def table(runs: Mapping[str, LoggedRun], told: RunGuarantee) -> Iterator[str]:
    """What is promised, in a sentence, and markdown with one line per task and a column per model."""
    yield f"{sentences(told)[0]}\n"
    of = {(cell.run, cell.task): cell for cell in told.cells}
    tasks = [task for task in TASKS if any((name, task) in of for name in runs)]
    yield from markdown(("task", *runs), [(task, *(_shown(of.get((name, task))) for name in runs)) for task in tasks])
    yield ""


def counts(runs: Mapping[str, LoggedRun], told: RunGuarantee) -> Iterator[str]:
    """Markdown with one line per family of shifts and a column per model: on how many tasks a guarantee holds."""
    of = {(cell.run, cell.task): cell.verdict.value for cell in told.cells}
    lines = []
    for part, tasks in PARTS.items():
        cells = []
        for name in runs:
            verdicts = [of[name, task] for task in tasks if (name, task) in of]
            shown = [f"{verdicts.count(one)} {one}" for one in dict.fromkeys(sorted(verdicts))]
            cells.append(", ".join(shown))
        lines.append((part, *cells))
    yield from markdown(("", *runs), lines)
    yield ""


def reweighed_table(by: Mapping[Covariate, RunGuarantee], name: str) -> Iterator[str]:
    """Markdown with one line per task of a model: thresholds that were chosen with weights by each covariate."""
    of = {covariate: {cell.task: cell for cell in told.cells if cell.run == name} for covariate, told in by.items()}
    tasks = [task for task in TASKS if all(task in cells for cells in of.values())]
    lines = [(task, *(text for cells in of.values() for text in _reweighed(cells[task]))) for task in tasks]
    heads = [head for one in by for head in (f"by {one.value}", "AUROC", "effective images")]
    yield from markdown((name, *heads), lines)
    yield ""


def _reweighed(cell: JudgedCell) -> tuple[str, str, str]:
    one = cell.reweighed
    assert one is not None
    about = f"{one.auroc:.2f}", f"{one.effective_images:.0f}"
    if not one.overlaps:
        return "no overlap", *about
    if not math.isfinite(one.threshold):
        return "none shown", *about
    if math.isnan(one.risk):
        return one.verdict.value, *about
    return f"{one.verdict.value}: {100 * one.risk:.1f} of {100 * one.coverage:.0f}", *about


def _shown(cell: JudgedCell | None) -> str:
    if cell is None:
        return ""
    if math.isnan(cell.risk):
        return cell.verdict.value
    risk, low, high = (f"{100 * value:.1f}" for value in (cell.risk, cell.low, cell.high))
    flipped = "" if cell.flipped_high is None else f", flipped ≤ {100 * cell.flipped_high:.1f}"
    return f"{cell.verdict.value}: {risk} [{low}, {high}] of {100 * cell.coverage:.0f}{flipped}"


def run_missing(output: Path, limit: int | None, threads: int) -> None:
    """Run every part of every model that has no folder yet."""
    evaluator = None
    for name, part in order():
        folder = output / _named(name) / part
        if folder.exists():
            continue
        evaluator = evaluator or Evaluator(threads)
        folder.parent.mkdir(parents=True, exist_ok=True)
        model, arguments = MODELS[name]
        kept, start = f"{arguments},features={output / _named(name) / 'features'}", time.process_time()
        evaluator.run(model, kept, PARTS[part], limit=limit, folder=folder)
        print(f"{name}, {part}: {time.process_time() - start:.0f} s of processor time", flush=True)


def main() -> None:
    """Run what is missing, and print the tables of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--risk", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--limit", type=int, help="expressions per task; only for trying things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    if not options.table:
        run_missing(options.output, options.limit, options.threads)
    runs, features = finished(options.output), RunFeatures()
    first, *others = runs
    for risk in options.risk:
        told = {}
        for by in Covariate:
            settings = GuaranteeSettings(risk, calibrate=DEV, share=0.5, per_image=True, reweigh=True, reweigh_by=by)
            told[by] = guarantee(first, runs[first], {name: runs[name] for name in others}, settings, features)
        whole = told[Covariate.FEATURES]
        print("\n".join([*table(runs, whole), *counts(runs, whole)]))
        print("\n".join(line for name in (first, *others[-1:]) for line in reweighed_table(told, name)))


if __name__ == "__main__":
    main()
