"""How many images the distance from the unquantized model needs to rank quantizers as accuracy on all of them does.

    python -m bench.distance_ranking --output distance_ranking [--limit N]
    python -m bench.distance_ranking --output distance_ranking --table

Each quantizer of the demo is one run of lmms-eval's evaluator, in this process, with `reference=none`; a rerun does
only what is missing. Images are then drawn with replacement, with all their expressions, and Kendall's tau-b compares
the order of the quantizers by each measure on the drawn images with their order by `acc@0.5` on all images: its mean
over draws, and the interval that holds 95 % of them. The first column is what labels would give on the same draws.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.evaluating import Evaluator
from bench.reporting import markdown
from lmms_plugin.analysis import distances, logs
from lmms_plugin.analysis.logs import LoggedRun, read_one
from lmms_plugin.analysis.measure import MeasurementSettings

Floats = npt.NDArray[np.float64]
TASK = "shapes_rec"
BITS = (4, 3, 2)
GROUPS = (128, 32)
PLAIN, CALIBRATED = ("rtn", "hqq"), ("awq",)
ACCURACY = "acc@0.5 (labels)"
FALLING = (ACCURACY, "token_agreement", "answer_agreement", "answer_probability_change")
"""Columns of which less is worse."""
SHOWN = (ACCURACY, "kl", "kl_coordinates", "box_shift", "answer_agreement", "answer_probability_change")
SIZES = (3, 5, 10, 20, 40, 80, 160)
DRAWS = 1000


def models() -> Iterator[tuple[str, str, str]]:
    """Folder, name and arguments of every quantizer."""
    common = "pretrained=demo,dtype=float32,device=cpu,batch_size=64,reference=none"
    for method, group, bits in product(PLAIN, GROUPS, BITS):
        yield f"{method}-{bits}-{group}", f"quant_{method}", f"{common},bits={bits},group_size={group}"
    # Those that take longest come last.
    for method, bits in product(CALIBRATED, BITS):
        yield f"{method}-{bits}", f"quant_{method}", f"{common},bits={bits}"


class PerImage(NamedTuple):
    """Sums and numbers of answers with a value, of every measure, quantizer and image.

    Attributes:
        sums: Shape (measures, quantizers, images).
        known: Shape (measures, quantizers, images).
    """

    sums: Floats
    known: Floats

    def means(self, counts: Floats) -> Floats:
        """Means for images that count so often, (images, draws) → (measures, quantizers, draws)."""
        with np.errstate(invalid="ignore"):
            means: Floats = (self.sums @ counts) / (self.known @ counts)
        return means


def per_image(runs: Sequence[LoggedRun], names: Sequence[str] = SHOWN) -> PerImage:
    """Add the answers of each image up."""
    records = [run.tasks[TASK] for run in runs]
    if any(not np.array_equal(one.ids, records[0].ids) for one in records):
        raise SystemExit("the runs are of different documents: remove the folder, or name another")
    images = records[0].names.size
    sums, known = np.zeros((2, len(names), len(runs), images))
    for k, (run, one) in enumerate(zip(runs, records, strict=True)):
        told = logs.references(run, TASK)
        for row, name in enumerate(names):
            values = one.outcome if name == ACCURACY else _column(told, one.ids.tolist(), name)
            there = ~np.isnan(values)
            sums[row, k] = np.bincount(one.image[there], values[there], minlength=images)
            known[row, k] = np.bincount(one.image[there], minlength=images)
    return PerImage(sums, known)


def _column(told: Mapping[str, Mapping[str, float] | None], ids: Sequence[str], name: str) -> Floats:
    return np.array([(told[one] or {}).get(name, np.nan) for one in ids])


def taus(scores: Floats, truth: Floats) -> Floats:
    """Kendall's tau-b of each column of scores, (quantizers, draws), with the truth, (quantizers,): (draws,)."""
    first, second = np.triu_indices(truth.size, 1)
    ours, its = np.sign(scores[first] - scores[second]), np.sign(truth[first] - truth[second])
    pairs = np.sqrt((ours**2).sum(0) * (its**2).sum())
    with np.errstate(invalid="ignore"):
        tau: Floats = (ours * its[:, None]).sum(0) / pairs
    return tau


def ranking(found: PerImage, names: Sequence[str] = SHOWN, seed: int = 0) -> Iterator[tuple[int, list[Floats]]]:
    """Number of images → tau of each measure on each draw of as many."""
    images = found.sums.shape[2]
    truth = found.means(np.ones((images, 1)))[names.index(ACCURACY), :, 0]
    for size in (*(size for size in SIZES if size < images), images):
        counts = np.random.default_rng([seed, size]).multinomial(size, np.full(images, 1 / images), DRAWS).T
        means = found.means(counts.astype(np.float64))
        rows = [means[k] if name in FALLING else -means[k] for k, name in enumerate(names)]
        yield size, [taus(row, truth) for row in rows]


def ranking_table(found: PerImage) -> Iterator[str]:
    """Markdown, one line per number of images."""
    lines = []
    for size, columns in ranking(found):
        cells = []
        for tau in columns:
            low, high = np.nanquantile(tau, [0.025, 0.975])
            cells.append(f"{np.nanmean(tau):.2f} [{low:.2f}, {high:.2f}]")
        lines.append((str(size), *cells))
    return markdown(("images", *SHOWN), lines)


def quantizers_table(runs: Mapping[str, LoggedRun]) -> Iterator[str]:
    """Markdown, one line per quantizer: its accuracy, its distance, and how well the latter predicts flips."""
    measures = ("kl", "kl_coordinates", "box_shift", "answer_probability_change")
    lines = []
    for name, run in runs.items():
        (one,) = distances.of_run(run, MeasurementSettings(resamples=200))
        by_name = {each.measure: each for each in one.measures}
        accuracy = float(run.tasks[TASK].outcome.mean())
        values = [f"{by_name[each].value:.3g}" for each in ("kl", "kl_coordinates", "box_shift", "answer_agreement")]
        shares = [f"{by_name[each].flips_predicted:.2f}" for each in measures]
        flipped = (one.lost or 0) + (one.won or 0)
        chance = f"{flipped / one.records:.2f}"
        lines.append((name, f"{accuracy:.3f}", *values, str(flipped), chance, *shares))
    heads = ("quantizer", "acc@0.5", "kl", "kl_coordinates", "box_shift", "answer_agreement", "flips", "chance")
    return markdown((*heads, *(f"by {each}" for each in measures)), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or print the tables of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="expressions; only for trying things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(arguments)
    if options.table:
        runs = {name: read_one(options.output / name) for name, *_ in models() if (options.output / name).is_dir()}
        print("\n".join((*quantizers_table(runs), "", *ranking_table(per_image(list(runs.values()))))))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(options.threads)
    for name, model, model_args in models():
        if not (options.output / name).is_dir():
            results = evaluator.run(model, model_args, (TASK,), limit=options.limit, folder=options.output / name)
            scores = results["results"][TASK]
            print(f"{name}: {scores['acc@0.5,none']:.3f}, {scores['kl,none']:.4f} nats", flush=True)


if __name__ == "__main__":
    main()
