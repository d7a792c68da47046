"""Which rows of a layer's input are image tokens, while a model reads: told once per pass, asked by single layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

MODALITIES = ("image", "text")
"""In the order of their static scales. Text is everything that is no image feature: prompts, padding, answers."""

_is_image: ContextVar[Tensor | None] = ContextVar("is_image", default=None)


def read(is_image: Tensor | None) -> None:
    """Say which positions (rows, columns) of what this thread reads next are image tokens; None for unknown."""
    _is_image.set(is_image)


@contextmanager
def reading(is_image: Tensor | None) -> Iterator[None]:
    """Say the same for the inside of a context."""
    token = _is_image.set(is_image)
    try:
        yield
    finally:
        _is_image.reset(token)


@contextmanager
def routed(rows: Tensor, total: int) -> Iterator[None]:
    """Say that inside a context only some rows are read, as by an expert.

    Args:
        rows: (fed,) int64, their indices.
        total: Number of all rows.
    """
    known = _is_image.get()
    fits = known is not None and known.numel() == total
    with reading(known.reshape(-1)[rows.to(known.device)] if known is not None and fits else None):
        yield


def image_rows(x: Tensor) -> Tensor:
    """Return which rows of an input (..., columns) are image tokens, (rows,) bool on its device.

    Raises:
        RuntimeError: It is not known.
    """
    known = _is_image.get()
    rows = x.shape[:-1].numel()
    if known is not None and known.numel() != rows and known.dim() == 2 == x.dim() - 1 and len(known) == len(x):
        # The output projection is given the last positions alone.
        known = known[:, known.shape[1] - x.shape[1] :]
    if known is None or known.numel() != rows:
        told = "nothing" if known is None else f"{known.numel()} positions"
        raise RuntimeError(
            f"inputs scaled per modality: expected to know of {rows} rows which are image tokens, but the model said"
            f" {told}; activation_granularity=tensor or token need not know"
        )
    return known.reshape(-1).to(x.device)
