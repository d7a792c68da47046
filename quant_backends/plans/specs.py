"""Storage of one layer's weights, and its notation in plan files: frozen values, pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, TypeGuard

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from lmms_plugin.quant_backends.formats.entries import format_of
from lmms_plugin.utils.reading.validation import Expected, Truth, Whole, validated

UNTOUCHED_BITS = 16
"""The number of bits that means: leave these weights as the checkpoint has them."""

DEFAULT_SAMPLES = 64
"""Calibration samples where neither the user nor the method names a number."""

MOST_SHARED_BYTES = 16 << 30
"""Bytes of calibration statistics that a folder may hold for other runs, all models together."""

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
    """Storage of the weights of one linear layer.

    Attributes:
        bits: Number of bits per weight, 2 to 8; 16 leaves the layer as it is.
        group_size: Number of consecutive input columns of one row that share a scale. None (or -1) means one scale for
            the whole row.
        symmetric: Whether the zero point is fixed in the middle of the code range instead of fitted to each group.
        format: Format of these weights (docs/formats.md); None for the method's own.
        activation_format: Format of these layers' inputs, or ``none`` to leave them as they are; None for the method's.
    """

    bits: Bits
    group_size: GroupSize = 128
    symmetric: Truth = False
    format: str | None = None
    activation_format: str | None = None

    @property
    def untouched(self) -> bool:
        """Return whether a layer with this spec keeps its weights."""
        return self.bits == UNTOUCHED_BITS


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def filled(*names: str) -> BeforeValidator:
    """Take what an entry of a plan file omits from the context's `default`.

    Args:
        *names: Fields of `QuantSpec` that may be omitted.
    """

    def fill(entry: Any, info: ValidationInfo[Mapping[str, Any]]) -> Any:
        default = {name: getattr(info.context["default"], name) for name in names}
        return {**default, **entry} if isinstance(entry, dict) else entry

    return BeforeValidator(fill)


def _spelt_out(entry: Any) -> Any:
    if not isinstance(entry, int | dict):
        words = "a number of bits, or a mapping with bits, group_size, symmetric, format, activation_format"
        raise PydanticCustomError("expected", "{words}", {"words": words})
    return {"bits": entry} if isinstance(entry, int) else with_bits(entry)


def with_bits(entry: dict[Any, Any]) -> dict[Any, Any]:
    """Return an entry of a plan file with what its format says: the number of bits, and the symmetry of integers.

    Raises:
        ValueError: There is no such format, or the entry says something that its format decides.
    """
    name = entry.get("format")
    if not isinstance(name, str):
        return entry
    form = format_of(name)
    settled = ("symmetric",) if form.element.integer else ("symmetric", "group_size")
    if given := next((key for key in settled if key in entry), None):
        raise ValueError(f"format {name} decides {given}: leave out {given}")
    if entry.get("bits", form.bits) != form.bits:
        raise ValueError(f"format {name} has {form.bits} bits per weight, got bits: {entry['bits']}; leave out bits")
    return {**entry, "bits": form.bits, "symmetric": form.symmetric}


PlannedSpec = Annotated[QuantSpec, filled("bits", "group_size", "symmetric"), BeforeValidator(_spelt_out)]
"""The spec of a plan file: bits, or a mapping with some of a spec's fields."""


def touched(spec: QuantSpec | None) -> QuantSpec | None:
    """Return the spec, None for one that leaves weights as they are."""
    return None if spec is None or spec.untouched else spec


def write_spec(spec: QuantSpec | None) -> dict[str, Any] | None:
    """Return a spec as JSON-ready values; formats only where they are its own."""
    if spec is None:
        return None
    formats = ("format", "activation_format")
    return {key: value for key, value in asdict(spec).items() if value is not None or key not in formats}
