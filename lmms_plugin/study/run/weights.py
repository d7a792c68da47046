"""Size of a checkpoint before and after quantization, from its configuration alone: layers are made without weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.quant_backends import SERVED, backend_class, get
from lmms_plugin.quant_backends.backend import CheckpointBackend
from lmms_plugin.quant_backends.plans.plan import Component, QuantSpec
from lmms_plugin.quant_backends.structure.components import components
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.served_arms import options_of
from lmms_plugin.utils.reading.readable import readable

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SCALE_AND_ZERO = 2
_LONGEST = 200


class Size(NamedTuple):
    """Size of a cell's model.

    Attributes:
        parameters: Number of parameters, from the name where the configuration cannot be read; None if unknown.
        bytes: Size of its quantized weights, without activations, caches and what calibration needs; None where the
            configuration cannot be read.
        basis: Basis of the estimate, in words.
    """

    parameters: int | None
    bytes: int | None
    basis: str


class _Layers(NamedTuple):
    parameters: int
    components: Mapping[str, Component]
    shapes: Mapping[str, tuple[int, int]]


def size(cell: Cell, *, cuda: bool) -> Size:
    """Estimate the size of a cell's model; nothing is downloaded.

    Args:
        cell: Cell of a study.
        cuda: Whether it runs on a GPU, where `dtype=auto` is bfloat16.
    """
    arguments = ModelArguments.parse(cell.arguments, options_of(cell.backend))
    kind = None if cell.backend == SERVED else backend_class(cell.backend)
    if kind is not None and issubclass(kind, CheckpointBackend):
        return Size(None, None, "unknown: the checkpoint came quantized")
    try:
        layers = _layers(arguments.find_checkpoint(), arguments.trust_remote_code)
        if kind is None:
            return Size(layers.parameters, None, "unknown: the weights are the server's")
        plan = arguments.quant_plan(get(cell.backend, **arguments.options).default_bits)
        specs = plan.assign(layers.components).specs if plan.specs else {}
    # If the configuration lacks something, the estimate is missing; the cell itself is not wrong.
    except (OSError, ValueError, AttributeError, NotImplementedError) as error:
        return Size(_by_name(arguments.pretrained), None, f"unknown: {' '.join(str(error).split())[:_LONGEST]}")
    dense = _BYTES.get(arguments.dtype, 2 if cuda else 4)
    saved = sum(_saved(spec, *layers.shapes[name], dense) for name, spec in specs.items())
    return Size(layers.parameters, layers.parameters * dense - saved, "weights alone, by the configuration")


def _by_name(checkpoint: str) -> int | None:
    """Return the active parameters by the checkpoint's name: 7B, or 30B-A3B where 3 billion are active."""
    told = re.findall(r"(?<![A-Za-z\d.])(A?)(\d+(?:\.\d+)?)[Bb](?![A-Za-z])", checkpoint.rpartition("/")[2])
    billions = next((number for active, number in told if active), told[0][1] if told else None)
    return None if billions is None else round(float(billions) * 1e9)


def _saved(spec: QuantSpec, rows: int, columns: int, dense: int) -> int:
    groups = rows * math.ceil(columns / (spec.group_size or columns))
    return rows * columns * dense - math.ceil(rows * columns * spec.bits / 8) - groups * _SCALE_AND_ZERO * dense


@cache
def _layers(checkpoint: str, trust_remote_code: bool) -> _Layers:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with readable(f"{checkpoint}: config.json"):
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    found = components(model)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in found}
    return _Layers(sum(one.numel() for one in model.parameters()), found, shapes)
