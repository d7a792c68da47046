"""Which guarantees that are chosen at 16 bits on clean images hold at 8, 4 and 3 bits, clean and under shift?

    python -m bench.guarantees --output guarantees [--risk 0.05] [--threads N]
    python -m bench.guarantees --output guarantees --table

Each model is one run of lmms-eval's evaluator, in this process, on the embedded demo: `shapes_rec_dev`, whose scenes
are in no other task, clean scenes, and these under four corruptions; a rerun does only what is missing. The threshold
is chosen on half of the scenes of `shapes_rec_dev` by the unquantized model, in bfloat16, and judged on the other half
and on all other tasks, of every model. Images count alike, whose bounds are narrower than those of answers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from bench.evaluating import Evaluator
from bench.reporting import markdown
from lmms_plugin.analysis.guarantees.guarantee import guarantee
from lmms_plugin.analysis.guarantees.guarantee_results import GuaranteeSettings, JudgedCell
from lmms_plugin.analysis.guarantees.guarantee_sentences import sentences
from lmms_plugin.analysis.logs import LoggedRun, read_one

DEV, CLEAN = "shapes_rec_dev", "shapes_rec"
SEVERITY = 3
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "corruptions": (
        "gaussian_noise",
        "impulse_noise",
        "defocus_blur",
        "centred_motion_blur",
        "snow",
        "fog",
        "contrast",
        "jpeg_compression",
    ),
    "moving": ("crop", "horizontal_flip", "quarter_turn", "rotation", "downscale", "perspective"),
    "language": ("keyboard_typos", "fillers", "dropped_words", "reordered_words", "synonyms", "paraphrase"),
}
"""Shifts by family: two each of noise, blur, weather and digital corruptions, and six of ten of the other two."""
SHIFTED = tuple(f"shapes_shift_{name}_{SEVERITY}" for names in FAMILIES.values() for name in names)
TASKS = (DEV, CLEAN, *SHIFTED)
COMMON = "pretrained=demo,dtype=bfloat16,batch_size=64"
MODELS: Mapping[str, tuple[str, str]] = {
    "16 bits": ("quant_none", COMMON),
    **{f"{bits} bits": ("quant_rtn", f"{COMMON},bits={bits}") for bits in (8, 4, 3)},
}


def finished(folder: Path) -> dict[str, LoggedRun]:
    """The runs that there are, with the tasks that are asked about."""
    found = {}
    for name in MODELS:
        if (place := folder / name.replace(" ", "_")).exists():
            run = read_one(place)
            found[name] = replace(run, tasks={task: run.tasks[task] for task in TASKS if task in run.tasks})
    return found


def table(runs: Mapping[str, LoggedRun], settings: GuaranteeSettings) -> Iterator[str]:
    """What is promised, in a sentence, and markdown with one line per task and a column per model."""
    first, *others = runs
    told = guarantee(first, runs[first], {name: runs[name] for name in others}, settings)
    yield f"{sentences(told)[0]}\n"
    of = {(cell.run, cell.task): cell for cell in told.cells}
    tasks = [task for task in TASKS if any((name, task) in of for name in runs)]
    yield from markdown(("task", *runs), [(task, *(_shown(of.get((name, task))) for name in runs)) for task in tasks])
    yield ""


def _shown(cell: JudgedCell | None) -> str:
    if cell is None:
        return ""
    if math.isnan(cell.risk):
        return cell.verdict.value
    risk, low, high = (f"{100 * value:.1f}" for value in (cell.risk, cell.low, cell.high))
    flipped = "" if cell.flipped_high is None else f", flipped ≤ {100 * cell.flipped_high:.1f}"
    return f"{cell.verdict.value}: {risk} [{low}, {high}] of {100 * cell.coverage:.0f}{flipped}"


def main() -> None:
    """Run what is missing, and print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--risk", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--limit", type=int, help="expressions per task; only for trying things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    evaluator = None
    for name, (model, arguments) in MODELS.items():
        folder = options.output / name.replace(" ", "_")
        if not folder.exists() and not options.table:
            evaluator = evaluator or Evaluator(options.threads)
            kept = f"{arguments},features={options.output / 'features' / folder.name}"
            evaluator.run(model, kept, TASKS, limit=options.limit, folder=folder)
            print(name, flush=True)
    runs = finished(options.output)
    for risk in options.risk:
        print("\n".join(table(runs, GuaranteeSettings(risk, calibrate=DEV, share=0.5, per_image=True))))


if __name__ == "__main__":
    main()
