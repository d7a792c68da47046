"""Quantizers of vision-language models, one file each, behind one small interface.

Importing this package is light (no torch): its names are listed before any model is chosen.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend

__all__ = ["BACKENDS", "backend_class", "get", "names", "option_types"]

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


def get(name: str, **options: Any) -> Backend:
    """Return the backend registered under `name`.

    Args:
        name: As registered.
        **options: The backend's own (see `option_types`).

    Raises:
        ValueError: No such backend (the message names the nearest one and lists them all), no such option, or a
            value that the backend refuses.
    """
    kind = backend_class(name)
    known = option_types(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r} (it has: {', '.join(known) or 'none'})")
    return kind(**options)


def option_types(name: str) -> dict[str, Any]:
    """Return the options of a backend with their types: the fields of its dataclass.

    Raises:
        ValueError: No such backend.
    """
    kind = backend_class(name)
    hints = typing.get_type_hints(kind)
    return {option.name: hints[option.name] for option in dataclasses.fields(kind)}


def backend_class(name: str) -> type[Backend]:
    """Return the class registered under `name`, importing its module.

    Raises:
        ValueError: No such backend.
    """
    if name not in BACKENDS:
        nearest = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown quantization backend {name!r}{hint} (known: {', '.join(BACKENDS)})")
    module, _, attribute = BACKENDS[name].partition(":")
    kind: type[Backend] = getattr(importlib.import_module(module), attribute)
    return kind
