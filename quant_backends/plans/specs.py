"""How the weights of one layer are stored, and how plan files say it: frozen values, pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeGuard

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from lmms_plugin.utils.reading.validation import Expected, Truth, Whole, validated

UNTOUCHED_BITS = 16
"""The number of bits that means: leave these weights as the checkpoint has them."""

DEFAULT_SAMPLES = 64
"""Calibration samples where neither the user nor the method names a number."""

Bits = Annotated[
    Annotated[Whole, Field(ge=2, le=8)] | Annotated[Whole, Field(ge=UNTOUCHED_BITS, le=UNTOUCHED_BITS)],
    Expected("an integer from 2 to 8, or 16 for untouched"),
]
GroupSize = Annotated[
    Annotated[Whole, Field(ge=1)] | None,
    BeforeValidator(lambda size: None if is_int(size) and size == -1 else size),
    Expected("a positive integer, or -1 for one group per row"),
]


@validated
class QuantSpec:
    """How the weights of one linear layer are stored.

    Attributes:
        bits: Bits per weight, 2 to 8; 16 leaves the layer as it is.
        group_size: Consecutive input columns of one row that share a scale. None (or -1) means one
            scale for the whole row.
        symmetric: Zero point fixed in the middle of the code range instead of fitted to each group.
    """

    bits: Bits
    group_size: GroupSize = 128
    symmetric: Truth = False

    @property
    def untouched(self) -> bool:
        """Whether a layer with this spec keeps its weights."""
        return self.bits == UNTOUCHED_BITS


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def filled(*names: str) -> BeforeValidator:
    """Take what an entry of a plan file leaves out from the context's `default`.

    Args:
        *names: Of `QuantSpec`, which may be left out.
    """

    def fill(entry: Any, info: ValidationInfo[Mapping[str, Any]]) -> Any:
        default = {name: getattr(info.context["default"], name) for name in names}
        return {**default, **entry} if isinstance(entry, dict) else entry

    return BeforeValidator(fill)


def _spelt_out(entry: Any) -> Any:
    if not isinstance(entry, int | dict):
        words = "a number of bits, or a mapping with bits, group_size, symmetric"
        raise PydanticCustomError("expected", "{words}", {"words": words})
    return {"bits": entry} if isinstance(entry, int) else entry


PlannedSpec = Annotated[QuantSpec, filled("bits", "group_size", "symmetric"), BeforeValidator(_spelt_out)]
"""The spec of a plan file: bits, or a mapping with some of a spec's fields."""


def touched(spec: QuantSpec | None) -> QuantSpec | None:
    """Return the spec, None for one that leaves weights as they are."""
    return None if spec is None or spec.untouched else spec


def write_spec(spec: QuantSpec | None) -> dict[str, Any] | None:
    """Return a spec as JSON-ready values."""
    return None if spec is None else asdict(spec)
