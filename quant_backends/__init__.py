"""Registry of quantization methods for vision-language models, one file per method.

Importing this package does not import torch: lmms-eval lists the names before any model is chosen.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TYPE_CHECKING, Any

from lmms_plugin.utils import suggest

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend

__all__ = [
    "BACKENDS",
    "ENTRY_POINTS",
    "GGUF",
    "SERVED",
    "backend_class",
    "backend_name",
    "class_name",
    "get",
    "model_name",
    "names",
    "option_types",
]

BACKENDS: dict[str, str] = {
    "none": "lmms_plugin.quant_backends.methods.none:NoneBackend",
    "rtn": "lmms_plugin.quant_backends.methods.rtn:RtnBackend",
    "hqq": "lmms_plugin.quant_backends.methods.hqq:HqqBackend",
    "awq": "lmms_plugin.quant_backends.methods.awq:AwqBackend",
    "mbq": "lmms_plugin.quant_backends.methods.mbq:MbqBackend",
    "qig": "lmms_plugin.quant_backends.methods.qig:QigBackend",
    "gptq": "lmms_plugin.quant_backends.methods.gptq:GptqBackend",
    "gptaq": "lmms_plugin.quant_backends.methods.gptaq:GptaqBackend",
    "vlmq": "lmms_plugin.quant_backends.methods.vlmq:VlmqBackend",
    "smoothquant": "lmms_plugin.quant_backends.methods.smoothquant:SmoothQuantBackend",
    "ptqtp": "lmms_plugin.quant_backends.methods.ptqtp:PtqtpBackend",
    "ptqtp_weighted": "lmms_plugin.quant_backends.methods.ptqtp:WeightedPtqtpBackend",
    "quanto": "lmms_plugin.quant_backends.methods.quanto:QuantoBackend",
    "bitsandbytes": "lmms_plugin.quant_backends.methods.bitsandbytes:BitsAndBytesBackend",
    "torchao": "lmms_plugin.quant_backends.methods.torchao:TorchaoBackend",
    "autoround": "lmms_plugin.quant_backends.methods.autoround:AutoRoundBackend",
    "prequantized": "lmms_plugin.quant_backends.checkpoints.external:PrequantizedBackend",
}
"""Built-in name -> ``module:Class``, imported only when asked for."""

SERVED = "served"
"""Where a backend's name would be: this model's weights are a server's, which quantized them or not."""
GGUF = "gguf"
"""Likewise: this model is a GGUF file, which llama.cpp's server runs."""
_PREFIX = "quant_"
ENTRY_POINTS = "lmms_plugin.quant_backends"
"""Group of entry points by which other packages add backends: name -> a subclass of `Backend`."""


def names() -> tuple[str, ...]:
    """Return the names of all backends, built-in ones first, without importing those of other packages."""
    return tuple(dict.fromkeys((*BACKENDS, *(point.name for point in _entry_points()))))


def model_name(backend: str) -> str:
    """Return the lmms-eval model name of a backend: `quant_awq` for `awq`."""
    return f"{_PREFIX}{backend}"


def backend_name(model: str) -> str | None:
    """Return the backend of an lmms-eval model name: `awq` for `quant_awq`, None for models of other packages."""
    return model.removeprefix(_PREFIX) if model.startswith(_PREFIX) else None


def class_name(backend: str) -> str:
    """Return the name of the lmms-eval model class of a backend: `QuantAwq` for `awq`."""
    return "".join(part.capitalize() for part in model_name(backend).split("_"))


def get(name: str, **options: Any) -> Backend:
    """Return the backend registered under `name`.

    Args:
        name: Registered name.
        **options: Options of the backend (see `option_types`).

    Raises:
        ValueError: No such backend (the message names the nearest one and lists them all), no such option, or a value
            that the backend refuses.
    """
    kind = backend_class(name)
    known = option_types(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise suggest.unknown("option", unknown[0], known, name)
    return kind(**options)


def option_types(name: str) -> dict[str, Any]:
    """Return the options of a backend, the fields of its dataclass, with their types.

    Raises:
        ValueError: No such backend.
    """
    kind = backend_class(name)
    hints = typing.get_type_hints(kind)
    return {option.name: hints[option.name] for option in dataclasses.fields(kind)}


def backend_class(name: str) -> type[Backend]:
    """Return the class registered under `name`, importing its module.

    Raises:
        ValueError: No such backend, two backends of that name, or another package registered something else.
    """
    from_others = [point for point in _entry_points() if point.name == name]
    _expect_one(name, from_others)
    if from_others:
        return _checked(from_others[0])
    module, _, attribute = BACKENDS[name].partition(":")
    kind: type[Backend] = getattr(importlib.import_module(module), attribute)
    return kind


def _entry_points() -> EntryPoints:
    return _found_by(entry_points)


@cache
def _found_by(find: Callable[..., EntryPoints]) -> EntryPoints:
    # This reads the metadata of every installed package; planning a study would do so thousands of times.
    return find(group=ENTRY_POINTS)


def _expect_one(name: str, from_others: Sequence[EntryPoint]) -> None:
    owners = [BACKENDS[name]] if name in BACKENDS else []
    owners += [f"{point.value} of {_package(point)}" for point in from_others]
    if len(owners) > 1:
        raise ValueError(f"two quantization backends are called {name!r}: {' and '.join(owners)}")
    if not owners:
        raise suggest.unknown("quantization backend", name, names())


def _checked(point: EntryPoint) -> type[Backend]:
    # This imports torch, which listing the names must not.
    from lmms_plugin.quant_backends.backend import Backend

    kind = point.load()
    if not (isinstance(kind, type) and issubclass(kind, Backend) and getattr(kind, "name", None) == point.name):
        raise ValueError(
            f"{_package(point)} registers {point.value} as quantization backend {point.name!r}; expected a subclass of "
            f"Backend whose name is {point.name!r}, got {kind!r}"
        )
    return kind


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown package"
