"""Quantized checkpoints for serving: writing, and which engines can load them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lmms_plugin.quant_backends.checkpoints.forms import COMPRESSED_TENSORS
from lmms_plugin.quant_backends.checkpoints.saving import Saved, save_quantized
from lmms_plugin.quant_backends.checkpoints.scaled_layouts import LAYOUTS
from lmms_plugin.quant_backends.checkpoints.several_schemes import MIXED
from lmms_plugin.quant_backends.methods.format_options import FormatBackend
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.structure.components import components
from lmms_plugin.quant_backends.structure.roles import find_places
from lmms_plugin.quantize import Asked
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.utils.messages import command_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)
"""Bits and group sizes of vLLM's kernels for packed integer weights, according to its sources; whole rows work, too."""
_VLLM_CPU_BITS = 4
"""Bits of its kernel on a CPU, which refuses others and knows 16-bit inputs alone (seen with 0.32)."""


def quantize(asked: Asked, folder: Path, form: str, option: str) -> Saved:
    """Quantize a model and write it.

    Args:
        asked: Model and quantization, of `Asked.to_write`.
        folder: New or empty folder.
        form: Format, of `lmms_plugin.quant_backends.checkpoints.forms.FORMS`.
        option: Name of the user's option for the folder, for messages.

    Raises:
        ValueError: The result cannot be written in this form; as far as possible before any weight is read.
    """
    if form == COMPRESSED_TENSORS:
        _expect_whole_rows(asked)
        _expect_whole_groups(asked)
    vlm = asked.load()
    return save_quantized(vlm.model, vlm.chat.processor, vlm.report, folder, form=form, option=option)


def readers(saved: Saved, folder: Path) -> Iterator[str]:
    """Yield which engines load what was written to a folder, one line each."""
    yield command_line(("lmms-eval", "--model", "quant_prequantized", "--model_args", f"pretrained={folder}"))
    if saved.format != COMPRESSED_TENSORS:
        yield f"nothing without this package: it is in this package's own format, because {saved.reason}"
        return
    if saved.schemes > 1:
        yield "not transformers, which refuses several kinds of layers in one checkpoint (5.23)"
    else:
        inputs = ", and does not round inputs" if saved.rounds_inputs else ""
        yield f"transformers with compressed-tensors installed; it makes the weights dense while loading{inputs}"
    yield f"vLLM: {_vllm(saved)}"


def _vllm(saved: Saved) -> str:
    if saved.layout in (*LAYOUTS, MIXED):
        return f"by its format, {saved.layout}, if it knows the architecture (docs/formats.md says what was run)"
    odd = [bits for bits in saved.bits if bits not in VLLM_BITS]
    groups = [size for size in saved.group_sizes if size not in (*VLLM_GROUPS, None)]
    if odd or groups:
        kind = f"{odd[0]} bits" if odd else f"groups of {groups[0]}"
        able = f"{_listed(VLLM_BITS)} bits in groups of {_listed(VLLM_GROUPS)} or whole rows"
        return f"no, its kernels take {able}, not {kind}"
    told = "by its format, if it knows the architecture (docs/serving.md says what was run)"
    if any(bits != _VLLM_CPU_BITS for bits in saved.bits):
        return f"{told}; not on a CPU, where its kernel takes {_VLLM_CPU_BITS} bits alone"
    return f"{told}; on a CPU with --dtype float16 or bfloat16"


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"


def _expect_whole_rows(asked: Asked) -> None:
    """Refuse integers with rounded inputs in any form but that of W8A8."""
    for spec in asked.plan.specs:
        backend = asked.backend.for_spec(spec)
        if not isinstance(backend, FormatBackend) or backend.rounding is None or backend.stored is not None:
            continue
        asks = backend.spec_of(spec)
        if (asks.bits, asks.group_size, asks.symmetric) != (8, None, True):
            raise ValueError(
                f"{COMPRESSED_TENSORS} holds integers with {backend.rounding.label} only with a scale per row: it takes"
                " bits=8,group_size=-1,symmetric=True"
            )


def _expect_whole_groups(asked: Asked) -> None:
    """Refuse groups that do not divide the width of a layer, by the model's shapes alone."""
    model = _without_weights(asked)
    if model is None:
        return
    found = components(model)
    places = find_places(model, found)
    for name, component in found.items():
        layer = model.get_submodule(name)
        spec = asked.plan.spec_for(name, component, places.get(name))
        if not isinstance(layer, nn.Linear) or spec is None:
            continue
        size = _group_of(asked, spec)
        if size is not None and layer.in_features % min(size, layer.in_features):
            raise ValueError(
                f"{COMPRESSED_TENSORS} cannot hold {name}: groups of {size} do not divide its width of"
                f" {layer.in_features}; name another group_size or format"
            )


def _group_of(asked: Asked, spec: QuantSpec) -> int | None:
    """Return the columns that share a scale and have to divide a width; None for whole rows, and squares."""
    backend = asked.backend.for_spec(spec)
    if isinstance(backend, FormatBackend) and backend.stored is not None:
        return backend.stored.block[1] if backend.stored.block[0] == 1 else None
    return spec.group_size


def _without_weights(asked: Asked) -> PreTrainedModel | None:
    """Return the model without weights; None where that requires the checkpoint's own code."""
    from transformers import AutoModelForImageTextToText

    if asked.arguments.trust_remote_code:
        return None
    config = config_of(asked.arguments.find_checkpoint())
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model
