"""Names of the formats of saved models, without torch, so that what cannot be saved is refused early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend
    from lmms_plugin.quant_backends.plans.plan import QuantSpec

COMPRESSED_TENSORS = "compressed-tensors"
AUTO, OWN, GGUF = "auto", "own", "gguf"
FORMS = (AUTO, COMPRESSED_TENSORS, OWN)
"""What a user may ask for: `auto` is compressed-tensors where that can hold the weights, else our own format."""
WRITTEN = (*FORMS, GGUF)
"""What `lmms-plugin quantize` writes; GGUF is written from unquantized weights, without a method."""


def expect_form(form: str) -> None:
    """Refuse a name that is no format.

    Raises:
        ValueError: It is none of `FORMS`.
    """
    if form not in FORMS:
        raise ValueError(f"expected a format of {', '.join(WRITTEN)}, got {form!r}")


def expect_storable(backend: Backend, form: str = AUTO, specs: Sequence[QuantSpec] = ()) -> None:
    """Refuse a method whose layers cannot be written, before anything is loaded.

    Args:
        backend: Method with its options.
        form: One of `FORMS`.
        specs: Specs of the plan, as far as they are known.

    Raises:
        ValueError: Its layers cannot be written at all, or not in this form.
    """
    expect_form(form)
    if backend.unsaved is not None:
        raise ValueError(f"{backend.name} cannot be saved: {backend.unsaved}")
    if form != COMPRESSED_TENSORS:
        return
    reasons = (own.uncompressed for own in ([backend.for_spec(spec) for spec in specs] or [backend]))
    if reason := next(filter(None, reasons), None):
        raise ValueError(f"{COMPRESSED_TENSORS} cannot hold what {backend.name} makes: {reason}")
