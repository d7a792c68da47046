"""Time of a 1,000-fold cluster bootstrap of every metric at 10⁶ records, beside a loop that resamples the records.

    python -m bench.statistics [--records N] [--resamples N] [--workers N] [--loop N] [--json FILE]

Seven records per image on average. First everything together on `--workers` threads, by the clock on the wall, then
each kind of metric alone on one. The loop draws the same images, repeats their records and calls the metrics once per
resample; it is run for a few resamples (`--loop`) on the same draws and scaled up, and what it finds is compared with
ours: a fast wrong answer would be no achievement. Ratios are of processor seconds.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.reporting import Row, machine, write
from lmms_plugin import metrics
from lmms_plugin.metrics.bootstrap import Clusters, Draws, Statistic, bootstrap, draw
from lmms_plugin.metrics.calibration import Binned, Smooth
from lmms_plugin.metrics.localisation import Localised
from lmms_plugin.metrics.ranked import RANKED, RISKS, Ranked
from lmms_plugin.metrics.selective import COSTS, Gains
from lmms_plugin.metrics.sums import Means

EXPRESSIONS = 7
AT_RISK = {risk: 0.99 - risk for risk in RISKS}
AT_COST = dict(zip(COSTS, (0.7, 0.9, 0.99), strict=True))


class Records(NamedTuple):
    """Confidence, outcome and IoU, each of shape (n,), and the images."""

    confidence: np.ndarray
    outcome: np.ndarray
    iou: np.ndarray
    images: Clusters


class Case(NamedTuple):
    """Metrics made for counts, and the same numbers in the same order from the plain ones."""

    make: Callable[[Records], Statistic]
    plain: Callable[[np.ndarray, np.ndarray, np.ndarray], Sequence[float]]


def records(n: int) -> Records:
    """Overconfident records."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(6, 1.2, n)
    outcome = (rng.random(n) < confidence**1.5).astype(np.float64)
    iou = np.where(outcome > 0, rng.uniform(0.5, 1.0, n), rng.uniform(0.0, 0.5, n))
    images = max(n // EXPRESSIONS, 2)
    return Records(confidence, outcome, iou, Clusters(rng.integers(0, images, n), images))


def binned(c: np.ndarray, y: np.ndarray, _: np.ndarray) -> Sequence[float]:
    """What `Binned` counts."""
    parts = metrics.brier_parts(c, y)
    return [
        metrics.ece(c, y),
        metrics.mce(c, y),
        metrics.squared_ce(c, y),
        metrics.brier(c, y),
        *parts,
        metrics.nll(c, y),
    ]


def gained(c: np.ndarray, y: np.ndarray, _: np.ndarray) -> Sequence[float]:
    """What `Gains` counts."""
    points = [metrics.at_threshold(c, y, threshold) for threshold in AT_RISK.values()]
    earned = [metrics.effective_reliability(c, y, cost, threshold) for cost, threshold in AT_COST.items()]
    return [*(point.coverage for point in points), *(point.risk for point in points), *earned]


def ranked(name: str) -> Case:
    """One metric of `Ranked`."""
    kind, _, risk = name.partition("@")
    plain = partial(metrics.coverage_at_risk, risk=float(risk)) if kind == "coverage" else getattr(metrics, name)
    return Case(lambda r: Ranked(r.confidence, r.outcome, r.images, [name]), lambda c, y, u: [plain(c, y)])


ALONE = {name: ranked(name) for name in RANKED}
TOGETHER = {
    "means": Case(
        lambda r: Means({"accuracy": r.outcome, "mean_iou": r.iou}, r.images), lambda c, y, u: [y.mean(), u.mean()]
    ),
    "binned": Case(lambda r: Binned(r.confidence, r.outcome, r.images), binned),
    "localised": Case(
        lambda r: Localised(r.confidence, r.iou, r.images),
        lambda c, y, u: [metrics.laece_0(c, u), metrics.laace_0(c, u), metrics.mean_ece_over_iou(c, u)],
    ),
    "smooth_ece": Case(lambda r: Smooth(r.confidence, r.outcome, r.images), lambda c, y, u: [metrics.smooth_ece(c, y)]),
    "at thresholds": Case(lambda r: Gains(r.confidence, r.outcome, r.images, AT_RISK, AT_COST), gained),
    "ranked": Case(
        lambda r: Ranked(r.confidence, r.outcome, r.images),
        lambda c, y, u: [value for case in ALONE.values() for value in case.plain(c, y, u)],
    ),
}


def ours(cases: Sequence[Case], data: Records, resamples: int, workers: int) -> tuple[np.ndarray, float, float]:
    """Resamples of shape (resamples, metrics), seconds on the wall and of the processor, preparation included."""
    wall, processor = time.perf_counter(), time.process_time()
    statistics = [case.make(data) for case in cases]
    drawn: list[Draws] = bootstrap(statistics, data.images.count, resamples=resamples, workers=workers)
    seconds = time.perf_counter() - wall, time.process_time() - processor
    return np.concatenate([draws.resampled for draws in drawn], axis=1), *seconds


def looped(cases: Sequence[Case], data: Records, resamples: int) -> tuple[np.ndarray, float]:
    """The same by repeating the records of each resample, and the seconds of the processor."""
    start, found = time.process_time(), []
    for resample in range(resamples):
        times = draw(data.images.count, 0, resample)[data.images.index]
        arrays = [np.repeat(array, times) for array in data[:3]]
        found.append([value for case in cases for value in case.plain(*arrays)])
    return np.array(found), time.process_time() - start


def peak() -> float:
    """MiB that were resident at most since the process started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, cases: Sequence[Case], data: Records, resamples: int, loop: int, workers: int) -> Row:
    """One line of the table."""
    before = peak()
    values, wall, seconds = ours(cases, data, resamples, workers)
    highest = peak()
    expected, loop_seconds = looped(cases, data, min(loop, resamples))
    scaled = loop_seconds * resamples / len(expected)
    return {
        "case": name,
        "ratio": scaled / seconds,
        "seconds": seconds,
        "wall_seconds": wall,
        "workers": workers,
        "peak_mib": highest,
        "peak_mib_before": before,
        "baseline_seconds": scaled,
        "metrics": values.shape[1],
        "difference": float(np.abs(values[: len(expected)] - expected).max()),
    }


def main() -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="Threads of everything together.")
    parser.add_argument("--loop", type=int, default=5)
    parser.add_argument("--case", action="append", help="Only this case; may be given several times.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    everything = {"everything": list(TOGETHER.values())}
    known = everything | {name: [case] for name, case in (TOGETHER | ALONE).items()}
    data = records(options.records)
    print(f"{machine()}\n{options.records:,} records, {options.resamples:,} resamples; the loop scaled up")
    print(
        f"{'case':<16}{'metrics':>8}{'threads':>8}{'wall s':>8}{'processor s':>12}{'loop s':>9}{'ratio':>8}"
        f"{'difference':>12}"
    )
    rows = []
    for name in options.case or known:
        workers = options.workers if name in everything else 1
        row = measure(name, known[name], data, options.resamples, options.loop, workers)
        rows.append(row)
        print(
            f"{name:<16}{row['metrics']:>8}{workers:>8}{row['wall_seconds']:>8.1f}{row['seconds']:>12.1f}"
            f"{row['baseline_seconds']:>9.0f}{row['ratio']:>8.1f}{row['difference']:>12.1e}",
            flush=True,
        )
        if name in everything:
            print(
                f"{'':<16}{row['peak_mib']:.0f} MiB resident at most, {row['peak_mib_before']:.0f} before", flush=True
            )
    write(options.json, rows)


if __name__ == "__main__":
    main()
