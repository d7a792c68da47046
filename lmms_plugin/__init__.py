"""Quantized vision-language models in lmms-eval: grounding and calibration under domain shift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lmms_plugin.utils import moved
from lmms_plugin.utils.processes.quiet import hush

if TYPE_CHECKING:
    from lmms_plugin.data_frames import EvaluatedRuns

__version__ = "0.2.0"
__all__ = ["__version__", "read"]

hush()
moved.tell()


def read(
    results: str | Path,
    *,
    estimator: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    workers: int = 1,
) -> EvaluatedRuns:
    """Read all runs of a folder; their answers, metrics and comparisons are pandas DataFrames.

    Args:
        results: Results file of lmms-eval, a folder with such files (written with `--log_samples`), or a study.
        estimator: Confidence estimator; None for that of the task.
        resamples: Resamples of the images for every interval.
        seed: Seed of the resamples and of the held-out images.
        level: Confidence level of the intervals, in (0.5, 1).
        workers: Threads that resample.

    Raises:
        ValueError: There are no results, a log is damaged or incomplete, or a setting is invalid.
    """
    # Only now: whoever imports the package for something else needs neither pandas nor the reader.
    from lmms_plugin import data_frames
    from lmms_plugin.analysis.measure import MeasurementSettings

    settings = MeasurementSettings(estimator, resamples, seed, level, workers=workers)
    return data_frames.read(results, settings)
