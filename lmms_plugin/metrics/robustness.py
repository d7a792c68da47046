"""Robustness: the cost of shifts, over corruptions and severities.

Values come as a table of shape (shifts, severities), one number per cell, e.g. 1 − Acc@0.5 or ECE.
"""

import numpy as np
import numpy.typing as npt

from lmms_plugin.metrics._inputs import Floats


def corruption_errors(error: npt.ArrayLike, reference: npt.ArrayLike) -> Floats:
    """Corruption error (CE) of each shift, shape (shifts,): Σ of errors over severities ÷ that of the reference.

    The formula is that of Hendrycks & Dietterich, ICLR 2019, over any shifts and severities; their CE takes five
    severities and AlexNet as the reference. With the unquantized model as reference, 1.1 means 10 % more errors. NaN or
    ∞ where the reference has no errors.

    Args:
        error: Errors of the model, e.g. 1 − accuracy, shape (shifts, severities).
        reference: Errors of the reference model, same shape.
    """
    e, r = _pair(error, reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = e.sum(axis=1) / r.sum(axis=1)
    return ratios


def mean_corruption_error(error: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Mean of `corruption_errors` over the given shifts; 1 for as many errors as the reference.

    The mCE of ImageNet-C is this over its fifteen corruptions with AlexNet as the reference. NaN where the ratios of
    some shifts are ∞ and those of others −∞, which have no mean: the reference loses nothing to them.
    """
    ratios = corruption_errors(error, reference)
    endless = np.sign(ratios[np.isinf(ratios)])
    return float("nan") if np.unique(endless).size > 1 else float(ratios.mean())


def relative_mean_corruption_error(
    error: npt.ArrayLike, clean_error: float, reference: npt.ArrayLike, clean_reference: float
) -> float:
    """Like `mean_corruption_error`, for the errors beyond those on clean data (relative mCE of ImageNet-C).

    Above 1, the model loses more to shifts than the reference does, whatever their clean errors. As a ratio of
    differences it is unstable, of either sign or undefined where the reference loses little;
    `lmms_plugin.metrics.paired.interaction` answers the same question with an interval.
    """
    e, r = _pair(error, reference)
    return mean_corruption_error(e - clean_error, r - clean_reference)


def mean_under_corruption(value: npt.ArrayLike) -> float:
    """Mean over severities, then shifts.

    For an average precision under their fifteen corruptions at five severities it is the mPC of Michaelis et al. (arXiv
    1907.07484).
    """
    return float(_table("values", value).mean(axis=1).mean())


def retained(value: npt.ArrayLike, clean: float) -> float:
    """Share of the clean value that is retained under shift, `mean_under_corruption` ÷ clean.

    NaN or ∞ where the clean value is 0.
    """
    return _ratio(mean_under_corruption(value), clean)


def lost_per_severity(value: npt.ArrayLike, clean: float) -> Floats:
    """Share of the clean value that is lost at each severity, shape (severities,): 1 − mean over shifts ÷ clean.

    For metrics that should be high, such as coverage at 1 % risk. NaN or ∞ where the clean value is 0.
    """
    table = _table("values", value)
    return np.array([1.0 - _ratio(mean, clean) for mean in table.mean(axis=0)])


def added_per_severity(value: npt.ArrayLike, clean: float) -> Floats:
    """Increase over the clean value at each severity, shape (severities,): mean over shifts − clean.

    For metrics that should be low, such as ECE, where a ratio to a value near 0 would be meaningless.
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
