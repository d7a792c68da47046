"""Quantizers of vision-language models, one file each, behind one small interface.

Importing this package is light (no torch): its names are listed before any model is chosen.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend

__all__ = ["BACKENDS", "get", "names"]

BACKENDS: dict[str, str] = {
    "none": "lmms_plugin.quant_backends.none:NoneBackend",
    "rtn": "lmms_plugin.quant_backends.rtn:RtnBackend",
    "hqq": "lmms_plugin.quant_backends.hqq:HqqBackend",
    "awq": "lmms_plugin.quant_backends.awq:AwqBackend",
}
"""Registered name -> ``module:Class``, imported only when asked for."""


def names() -> tuple[str, ...]:
    """Return the registered backend names, in the order of registration."""
    return tuple(BACKENDS)


def get(name: str) -> Backend:
    """Return the backend registered under `name`.

    Raises:
        ValueError: No such backend; the message names the nearest one and lists them all.
    """
    if name not in BACKENDS:
        nearest = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown quantization backend {name!r}{hint} (known: {', '.join(BACKENDS)})")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
