"""Time of a 1,000-fold cluster bootstrap of every metric at 10⁶ records, beside a loop that resamples the records.

    python -m bench.statistics [--records N] [--resamples N] [--loop N] [--json FILE]

Seven records per image on average. The loop draws the same images, gathers their records and calls the metric once per
resample; it is run for a few resamples (`--loop`) on the same draws and scaled up, and what it finds is compared with
ours: a fast wrong answer would be no achievement. Both use one thread; seconds are the processor's.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.reporting import Row, machine, write
from lmms_plugin import metrics
from lmms_plugin.metrics.bootstrap import Clusters, Resampled, Statistic, bootstrap
from lmms_plugin.metrics.ranked import RANKED, Ranked
from lmms_plugin.metrics.selective import RISKS
from lmms_plugin.metrics.weighted import Binned, Gains, Localised, Means, Smooth

EXPRESSIONS = 7


def records(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Clusters]:
    """Overconfident records of images: confidence, outcome, IoU, image."""
    rng = np.random.default_rng(0)
    confidence = rng.beta(6, 1.2, n)
    outcome = (rng.random(n) < confidence**1.5).astype(np.float64)
    iou = np.where(outcome > 0, rng.uniform(0.5, 1.0, n), rng.uniform(0.0, 0.5, n))
    images = max(n // EXPRESSIONS, 2)
    return confidence, outcome, iou, Clusters(rng.integers(0, images, n), images)


def families(
    c: np.ndarray, y: np.ndarray, u: np.ndarray, clusters: Clusters
) -> dict[str, tuple[Callable[[], Statistic], dict[str, Callable[..., float]]]]:
    """Case → (its statistic, the plain metrics that the loop calls for the same numbers)."""

    def part(name: str) -> Callable[..., float]:
        return lambda c, y: getattr(metrics.brier_parts(c, y), name.removeprefix("brier_"))

    plain: dict[str, Callable[..., float]] = {
        "ece": metrics.ece,
        "mce": metrics.mce,
        "squared_ce": metrics.squared_ce,
        "brier": metrics.brier,
        "nll": metrics.nll,
        "aurc": metrics.aurc,
        "e_aurc": metrics.e_aurc,
        "auroc": metrics.auroc,
        "aupr_error": metrics.aupr_error,
        "fpr_at_tpr": metrics.fpr_at_tpr,
        "adaptive_ece": metrics.adaptive_ece,
        **{f"coverage@{risk:g}": partial(metrics.coverage_at_risk, risk=risk) for risk in RISKS},
    }
    binned = {name: plain.get(name) or part(name) for name in Binned.names}
    localised = {name: getattr(metrics, name) for name in Localised.names}
    gained = {
        "achieved_coverage@0.05": lambda c, y: metrics.at_threshold(c, y, 0.9).coverage,
        "achieved_risk@0.05": lambda c, y: metrics.at_threshold(c, y, 0.9).risk,
        "phi@10": partial(metrics.effective_reliability, cost=10, threshold=0.95),
    }
    single = {name: (partial(Ranked, c, y, clusters, [name]), {name: plain[name]}) for name in RANKED}
    return {
        "accuracy": (lambda: Means({"accuracy": y}, clusters), {"accuracy": lambda c, y: float(y.mean())}),
        "binned": (lambda: Binned(c, y, clusters), binned),
        "localised": (lambda: Localised(c, u, clusters), localised),
        "smooth_ece": (lambda: Smooth(c, y, clusters), {"smooth_ece": metrics.smooth_ece}),
        "at thresholds": (lambda: Gains(c, y, clusters, {0.05: 0.9}, {10.0: 0.95}), gained),
        **single,
        "ranked, all": (lambda: Ranked(c, y, clusters), {name: plain[name] for name in RANKED}),
    }


def timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Processor seconds of a call and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(case: str, n: int, resamples: int, loop: int) -> Row:
    """One line of the table."""
    c, y, u, clusters = records(n)
    make, plain = families(c, y, u, clusters)[case]
    seconds, ours = timed(lambda: bootstrap([make()], clusters.count, resamples=resamples)[0].resampled)
    second = u if case == "localised" else y
    naive = [Resampled(metric, (c, second), clusters, name) for name, metric in plain.items()]
    loop_seconds, theirs = timed(
        lambda: np.concatenate([d.resampled for d in bootstrap(naive, clusters.count, resamples=loop)], axis=1)
    )
    scaled = loop_seconds * resamples / loop
    return {
        "case": case,
        "ratio": scaled / seconds,
        "seconds": seconds,
        "baseline_seconds": scaled,
        "metrics": len(plain),
        "difference": float(np.abs(ours[:loop] - theirs).max()),
    }


def main() -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--loop", type=int, default=5)
    parser.add_argument("--case", action="append", help="Only this case; may be given several times.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    print(f"{machine()}\n{options.records:,} records, {options.resamples:,} resamples; the loop scaled up")
    print(f"{'case':<20}{'metrics':>8}{'ours s':>9}{'loop s':>9}{'ratio':>8}{'difference':>12}")
    rows = []
    for case in options.case or families(*records(100)):
        row = measure(case, options.records, options.resamples, options.loop)
        rows.append(row)
        print(
            f"{case:<20}{row['metrics']:>8}{row['seconds']:>9.1f}{row['baseline_seconds']:>9.1f}"
            f"{row['ratio']:>8.1f}{row['difference']:>12.1e}",
            flush=True,
        )
    write(options.json, rows)


if __name__ == "__main__":
    main()
