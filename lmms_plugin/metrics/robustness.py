"""Robustness: what a shift costs, over corruptions and severities.

Values come as a table of shape (shifts, severities), one number per cell, e.g. 1 − Acc@0.5 or ECE.
"""

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import Floats


def corruption_errors(error: npt.ArrayLike, reference: npt.ArrayLike) -> Floats:
    """CE of each shift, shape (shifts,): Σ over severities of the error ÷ that of the reference model.

    The formula of Hendrycks & Dietterich, ICLR 2019, over any shifts and severities; their CE takes five severities and
    AlexNet as the reference. With the unquantized model as reference, 1.1 is a tenth more errors than it makes.
    NaN or ∞ where the reference makes none.

    Args:
        error: Shape (shifts, severities), e.g. 1 − accuracy.
        reference: The same of the reference model.
    """
    e, r = _pair(error, reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = e.sum(axis=1) / r.sum(axis=1)
    return ratios


def mean_corruption_error(error: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Mean of `corruption_errors` over the given shifts; 1 where it makes as many errors as the reference.

    The mCE of ImageNet-C is this over its fifteen corruptions with AlexNet as the reference.
    """
    return float(corruption_errors(error, reference).mean())


def relative_mean_corruption_error(
    error: npt.ArrayLike, clean_error: float, reference: npt.ArrayLike, clean_reference: float
) -> float:
    """As `mean_corruption_error`, of the errors beyond those on clean data (relative mCE of ImageNet-C).

    Above 1, the model loses more to shifts than the reference does, whatever they
    make of clean data. A ratio of differences: unstable, of either sign or undefined where the reference loses little;
    `lmms_plugin.metrics.paired.interaction` is the same question with an interval.
    """
    e, r = _pair(error, reference)
    return mean_corruption_error(e - clean_error, r - clean_reference)


def mean_under_corruption(value: npt.ArrayLike) -> float:
    """Mean over severities, then shifts.

    Of an average precision under their fifteen corruptions at five severities it is the mPC of Michaelis et al. (arXiv
    1907.07484).
    """
    return float(_table("values", value).mean(axis=1).mean())


def retained(value: npt.ArrayLike, clean: float) -> float:
    """Share of the clean value that is left under shift, `mean_under_corruption` ÷ clean.

    NaN or ∞ where the clean value is 0.
    """
    return _ratio(mean_under_corruption(value), clean)


def lost_per_severity(value: npt.ArrayLike, clean: float) -> Floats:
    """Share of the clean value that is lost at each severity, shape (severities,): 1 − mean over shifts ÷ clean.

    For what should be high, such as coverage at 1 % risk. NaN or ∞ where the clean value is 0.
    """
    table = _table("values", value)
    return np.array([1.0 - _ratio(mean, clean) for mean in table.mean(axis=0)])


def added_per_severity(value: npt.ArrayLike, clean: float) -> Floats:
    """What each severity adds to the clean value, shape (severities,): mean over shifts − clean.

    For what should be low, such as ECE, where a ratio to a value near 0 would say little.
    """
    added: Floats = _table("values", value).mean(axis=0) - clean
    return added


def _pair(error: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[Floats, Floats]:
    e, r = _table("errors", error), _table("reference errors", reference)
    if e.shape != r.shape:
        raise ValueError(f"expected errors and reference errors of the same cells, got shapes {e.shape} and {r.shape}")
    return e, r


def _table(name: str, values: npt.ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected {name} of shape (shifts, severities), got shape {table.shape}")
    return table


def _ratio(above: float, below: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(above) / np.float64(below))
