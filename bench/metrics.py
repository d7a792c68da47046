"""Time of the metrics at 10⁶ records, beside torchmetrics where it has the same one.

    python -m bench.metrics [--records N] [--repeats N] [--json FILE]

Both get arrays of their own kind, already in memory, and use one thread of the CPU; times are the median over repeats.
A ratio above 1 means that ours is faster. The two values are compared as well: a fast wrong answer would be no
achievement.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional import classification as torchmetrics

from bench.reporting import Row, interleaved, machine, write
from lmms_plugin import metrics


def records(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident binary records, none at exactly 1, where torchmetrics bins differently."""
    rng = np.random.default_rng(0)
    confidence = np.minimum(rng.beta(6, 1.2, n), 0.999999)
    return confidence, (rng.random(n) < confidence**1.5).astype(np.float64)


def pairs(
    confidence: np.ndarray, outcome: np.ndarray
) -> dict[str, tuple[Callable[[], float], Callable[[], float] | None]]:
    """Metric name → (ours, theirs or None)."""
    preds, target = torch.from_numpy(confidence), torch.from_numpy(outcome).long()
    floats = torch.from_numpy(outcome)
    c, y = confidence, outcome
    return {
        "ece": (lambda: metrics.ece(c, y), lambda: float(torchmetrics.binary_calibration_error(preds, target, 15))),
        "mce": (
            lambda: metrics.mce(c, y),
            lambda: float(torchmetrics.binary_calibration_error(preds, target, 15, norm="max")),
        ),
        "auroc": (lambda: metrics.auroc(c, y), lambda: float(torchmetrics.binary_auroc(preds, target))),
        "aupr_error": (
            lambda: metrics.aupr_error(c, y),
            lambda: float(torchmetrics.binary_average_precision(1 - preds, 1 - target)),
        ),
        "brier": (lambda: metrics.brier(c, y), lambda: float(torch.nn.functional.mse_loss(preds, floats))),
        "nll": (lambda: metrics.nll(c, y), lambda: float(torch.nn.functional.binary_cross_entropy(preds, floats))),
        "adaptive_ece": (lambda: metrics.adaptive_ece(c, y), None),
        "smooth_ece": (lambda: metrics.smooth_ece(c, y), None),
        "brier_parts": (lambda: metrics.brier_parts(c, y).reliability, None),
        "ece_floor": (lambda: metrics.ece_floor(c).p95, None),
        "aurc": (lambda: metrics.aurc(c, y), None),
        "e_aurc": (lambda: metrics.e_aurc(c, y), None),
        "coverage_at_risk": (lambda: metrics.coverage_at_risk(c, y, 0.05), None),
        "threshold_at_cost": (lambda: metrics.threshold_at_cost(c, y, 10), None),
        "fpr_at_tpr": (lambda: metrics.fpr_at_tpr(c, y), None),
        "mean_ece_over_iou": (lambda: metrics.mean_ece_over_iou(c, y), None),
    }


def measure(name: str, ours: Callable[[], float], theirs: Callable[[], float] | None, repeats: int) -> Row:
    """One line of the table."""
    calls = {"ours": ours} if theirs is None else {"ours": ours, "theirs": theirs}
    seconds = interleaved(calls, repeats)
    value, baseline = ours(), seconds.get("theirs")
    return {
        "case": name,
        "ratio": None if baseline is None else baseline / seconds["ours"],
        "seconds": seconds["ours"],
        "baseline_seconds": baseline,
        "value": value,
        "difference": None if theirs is None else abs(value - theirs()),
    }


def main() -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    print(f"{machine()}\n{options.records:,} records, median of {options.repeats}")
    print(f"{'metric':<20}{'value':>10}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}{'difference':>12}")
    for name, (ours, theirs) in pairs(*records(options.records)).items():
        row = measure(name, ours, theirs, options.repeats)
        rows.append(row)
        line = f"{name:<20}{row['value']:>10.5f}{1e3 * row['seconds']:>10.1f}"
        if theirs is not None:
            line += f"{1e3 * row['baseline_seconds']:>10.1f}{row['ratio']:>8.2f}{row['difference']:>12.1e}"
        print(line, flush=True)
    total = sum(row["seconds"] for row in rows)
    print(f"all of them: {total:.2f} s")
    write(options.json, rows)


if __name__ == "__main__":
    main()
