"""Validation of metric inputs: one-dimensional, finite fractions in [0, 1], as float64."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROUNDING = 1e-12
"""Tolerance of a bound that sums of soft outcomes should meet exactly: in floating point 1 - 0.7 exceeds 0.3."""


def fractions(name: str, values: npt.ArrayLike) -> Floats:
    """Check an array of fractions and return it as float64.

    Args:
        name: Name of the array in the error message.
        values: Shape (n,), n ≥ 1, each finite and in [0, 1]. Booleans count as 0 and 1.

    Raises:
        ValueError: The array is not one-dimensional, is empty, or holds NaN, an infinity or a value outside [0, 1].
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected {name} of shape (n,), got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"expected at least one value in {name}, got an empty array")
    # Written so that NaN, for which every comparison is false, fails too.
    if not (array.min() >= 0.0 and array.max() <= 1.0):
        bad = np.flatnonzero(~((array >= 0.0) & (array <= 1.0)))
        raise ValueError(
            f"expected every {name} to be a number in [0, 1], got {array[bad[0]]} at index {bad[0]}"
            f" ({bad.size} of {array.size} values); leave out records that have no {name}"
        )
    return array


def paired(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Check confidences together with their outcomes and return both as float64.

    Raises:
        ValueError: As `fractions`, or the two differ in length.
    """
    c, y = fractions("confidence", confidence), fractions("outcome", outcome)
    if c.size != y.size:
        raise ValueError(f"expected one outcome per confidence, got {c.size} confidences and {y.size} outcomes")
    return c, y


def one_fraction(name: str, value: float) -> float:
    """Check a single number in [0, 1].

    Raises:
        ValueError: It is NaN or outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"expected {name} in [0, 1], got {value}")
    return float(value)


def positive_int(name: str, value: int) -> int:
    """Check a count that must be at least 1.

    Raises:
        ValueError: It is not an integer or is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"expected {name} to be an integer of at least 1, got {value!r}")
    return int(value)
