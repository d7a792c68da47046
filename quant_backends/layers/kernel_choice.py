"""Choice of the kernel for a weight: the first that supports its shape and agrees with the dequantized product."""

from __future__ import annotations

import torch
from loguru import logger

from lmms_plugin.quant_backends.layers.gemlite_kernel import Gemlite
from lmms_plugin.quant_backends.layers.kernels import Kernel, Shape, same
from lmms_plugin.quant_backends.layers.native_kernels import NATIVE_KERNELS

KERNELS: tuple[type[Kernel], ...] = (*NATIVE_KERNELS, Gemlite)
"""In the order in which `fastest` tries them."""

AGREEMENT = 2**-5
"""Largest relative difference to the dequantized product at which a 16-bit kernel counts as right.

Rounding makes it about 2**-8; a kernel that misreads a layout is off by about 1.
"""


def fastest(weight: Kernel) -> Kernel:
    """Convert a weight to the layout of the best available kernel.

    A kernel is compared with the dequantized product on the first weight of each shape; one that fails or disagrees is
    not used for that shape, and a warning says so.
    """
    for kind in KERNELS:
        if kind.takes(weight.shape) and (kind.name, weight.shape) not in FAILED:
            made = _made(kind, weight)
            if made is not None:
                return made
    return weight.canonical()


_AGREED: set[tuple[str, Shape]] = set()
FAILED: set[tuple[str, Shape]] = set()
"""Kernels that this process does not try again."""


def _made(kind: type[Kernel], weight: Kernel) -> Kernel | None:
    key = (kind.name, weight.shape)
    made, fault = attempt(kind, weight, compared=key not in _AGREED)
    if fault is None:
        _AGREED.add(key)
        return made
    FAILED.add(key)
    logger.warning("Kernel {} {} ({}); such layers are dequantized instead", kind.name, fault, weight.shape)
    return None


def attempt(kind: type[Kernel], weight: Kernel, *, compared: bool = True) -> tuple[Kernel | None, str | None]:
    """Convert a weight to a kernel's layout; return it and the kernel's fault, None if there is none.

    Args:
        kind: Kernel class that supports such weights.
        weight: Weight in any layout.
        compared: Whether to compare products; see `disagreement`.
    """
    try:
        made = kind.from_codes(weight.codes(0, weight.rows), weight.bits)
        return made, disagreement(made, weight) if compared else None
    except Exception as error:  # The operator is missing or refuses these sizes; a library that compiles has its own.
        return None, f"fails: {error}"


def disagreement(kernel: Kernel, weight: Kernel) -> str | None:
    """Return how a kernel's codes or products differ from those of another form of a weight; None if they agree.

    Codes must come back exactly; products over few rows, and over many where it takes them, must be within `AGREEMENT`
    of float32's.
    """
    given, returned = (form.codes(0, form.rows) for form in (weight, kernel))
    if not all(same(a, b) for a, b in zip(given, returned, strict=True)):
        return "does not give codes back as they were"
    generator = torch.Generator().manual_seed(0)
    for rows in (rows for rows in (1, 5, 80) if rows <= 5 or kernel.takes_rows(rows, weight.dtype)):
        x = torch.randn(rows, weight.columns, generator=generator).to(weight.device, weight.dtype)
        expected = weight.dequantized_matmul(x.float())
        difference = float((kernel.matmul(x).float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not difference <= AGREEMENT:
            return f"is {difference:.2g} away from the dequantized product"
    return None
