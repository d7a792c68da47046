"""Saving of quantized models: safetensors, config, processor and report in one folder, written atomically.

Where it can hold the layers, the format is one of compressed-tensors, which transformers and vLLM read without this
package: ``pack-quantized`` for integers, `lmms_plugin.quant_backends.checkpoints.scaled_layouts` for FP8, NVFP4, MXFP4
and rounded inputs. All other layers of this package are written as their own tensors
(`lmms_plugin.quant_backends.checkpoints.own_format`). Either way codes and scales come back bit for bit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lmms_plugin.quant_backends.calibration.inputs import encode, to_model
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.checkpoints.folding import ScaledLinear, fold
from lmms_plugin.quant_backends.checkpoints.forms import AUTO, COMPRESSED_TENSORS, OWN
from lmms_plugin.quant_backends.checkpoints.own_format import QUANT_METHOD, describe_layers, version_of
from lmms_plugin.quant_backends.checkpoints.scaled_layouts import written_layer
from lmms_plugin.quant_backends.checkpoints.several_schemes import MIXED
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.packing import pack_stream
from lmms_plugin.quant_backends.plans.quant_report import QuantReport
from lmms_plugin.quant_backends.plans.report_schema import REPORT
from lmms_plugin.quant_backends.plans.rotation_spec import ROTATED_INPUTS
from lmms_plugin.quant_backends.rotations.hadamard import input_rotation
from lmms_plugin.quant_backends.structure.roles import find_mixtures
from lmms_plugin.utils import files
from lmms_plugin.utils.end_tokens import end_tokens
from lmms_plugin.utils.messages import one_line
from lmms_plugin.utils.outputs import expect_free

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


SHARD_SIZE = "5GB"
COMPRESSED_TENSORS_VERSION = "0.20.0"
"""The version whose packing of 3, 5, 6 and 7 bits is written; that of 2, 4 and 8 bits is the same in all."""


class Saved(NamedTuple):
    """Summary of a saved model.

    Attributes:
        format: ``compressed-tensors`` or ``lmms_plugin``.
        reason: Reason why it is not compressed-tensors; None when it is.
        bytes: Size of all files together.
        bits: Numbers of bits of the quantized layers, each listed once.
        group_sizes: Numbers of columns that share a scale, each listed once; None for whole rows.
        schemes: Number of different schemes among the quantized layers.
        layout: Format within compressed-tensors; None in our own.
        rounds_inputs: Whether inputs are rounded.
    """

    format: str
    reason: str | None
    bytes: int
    bits: tuple[int, ...]
    group_sizes: tuple[int | None, ...]
    schemes: int
    layout: str | None = None
    rounds_inputs: bool = False


def expect_savable(model: nn.Module) -> None:
    """Refuse models whose layers cannot be stored.

    Raises:
        ValueError: Nothing is quantized, or only a layer's library can write it.
    """
    # Imported here because it imports transformers' quantizers, and folders are checked long before.
    if not _layers(model):
        raise ValueError("save_quantized: nothing in this model is quantized; copy the checkpoint instead")
    describe_layers(_layers(model))


def save_quantized(
    model: PreTrainedModel,
    processor: Any,
    report: QuantReport,
    folder: str | Path,
    *,
    shard_size: str = SHARD_SIZE,
    form: str = AUTO,
    option: str = "save_quantized",
) -> Saved:
    """Write a quantized model.

    Input scales that are powers of two are folded into preceding layers first, which changes no bit of any output
    (`lmms_plugin.quant_backends.checkpoints.folding`).

    Everything is written to a temporary folder beside `folder`, which is renamed at the end: `folder` is complete or
    absent.

    Args:
        model: Model quantized by this package.
        processor: Processor of the same checkpoint.
        report: Report, written as ``quant_report.json``.
        folder: New or empty folder.
        shard_size: Size of the largest safetensors file, as in transformers.
        form: One of `lmms_plugin.quant_backends.checkpoints.forms.FORMS`.
        option: Option by which the user named the folder, for messages.

    Raises:
        ValueError: The folder is taken, or the model cannot be saved (see `expect_savable`), or not in this form.
    """
    from huggingface_hub import save_torch_state_dict

    target = expect_free(folder, option)
    expect_savable(model)
    if form != OWN:
        _fold(model, processor)
    layers = _layers(model)
    reason = _reason_for_own(model, layers, form)
    quantization = own_config(layers, report) if reason else compressed_tensors_config(model, layers)
    tensors = _own_tensors(model) if reason else _compressed_tensors(model, layers)
    with _whole_or_nothing(target, option) as unfinished:
        save_torch_state_dict(tensors, unfinished, max_shard_size=shard_size, is_main_process=True)
        _write_config(model, quantization, unfinished)
        if model.can_generate():
            _generation_config(model, processor).save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / REPORT).write_text(report.to_json(), encoding="utf-8")
        size = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    return _saved(layers, quantization, reason, size)


def _reason_for_own(model: nn.Module, layers: Mapping[str, QuantizedLinear], form: str) -> str | None:
    """Return why the model is written in our own format; None where it is not."""
    reason = _stacked(model) or next(
        (why for name, layer in layers.items() if (why := _not_compressible(name, layer))), None
    )
    if reason and form == COMPRESSED_TENSORS:
        raise ValueError(f"{COMPRESSED_TENSORS} cannot hold this model: {reason}")
    return "it was asked for" if form == OWN else reason


def _saved(
    layers: Mapping[str, QuantizedLinear], quantization: Mapping[str, Any], reason: str | None, size: int
) -> Saved:
    kinds = {(layer.bits, _group_size(layer)) for layer in layers.values()}
    bits = tuple(sorted({kind[0] for kind in kinds}))
    groups = tuple(sorted({kind[1] for kind in kinds}, key=lambda size: size or 0))
    schemes = len(quantization.get("config_groups", kinds))
    rounds = any(getattr(layer, "rounding", None) is not None for layer in layers.values())
    layout = quantization.get("format")
    return Saved(str(quantization["quant_method"]), reason, size, bits, groups, schemes, layout, rounds)


def own_config(layers: Mapping[str, QuantizedLinear], report: QuantReport) -> dict[str, Any]:
    """Return the ``quantization_config`` of our own format."""
    described = describe_layers(layers)
    return {
        "quant_method": QUANT_METHOD,
        "version": version_of(described),
        "method": report.method,
        "layers": described,
    }


def compressed_tensors_config(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    """Return the ``quantization_config`` of compressed-tensors.

    A single scheme for all layers names none of them, as vLLM needs it because it fuses some; several schemes list
    their layers, and have formats of their own where these differ. Dense layers are named under ``ignore``.
    (transformers 5.23 refuses several schemes; the library and `quant_prequantized` read them.)
    """
    kinds = {name: _scheme(layer) for name, layer in layers.items()}
    layouts = {layout for layout, _ in kinds.values()}
    groups: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    for name, (layout, arguments) in kinds.items():
        scheme = arguments if len(layouts) == 1 else {**arguments, "format": layout}
        schemes.setdefault(str(scheme), scheme)
        groups.setdefault(str(scheme), []).append(name)
    targets = [["Linear"]] if len(groups) == 1 else list(groups.values())
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": layouts.pop() if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "version": COMPRESSED_TENSORS_VERSION,
        # transformers would otherwise pack and unpack at the first forward pass, which fails with images.
        "dequantize": True,
        "config_groups": {
            f"group_{index}": {"targets": named, **scheme}
            for index, (named, scheme) in enumerate(zip(targets, schemes.values(), strict=True))
        },
        "ignore": dense,
        "kv_cache_scheme": None,
    }


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes into 32-bit words, lowest bits first, with codes crossing word boundaries.

    Args:
        codes: (rows, columns) uint8 in [0, 2**bits).
        bits: Number of bits per code.

    Returns:
        (rows, ceil(columns · bits / 32)) int32.
    """
    packed = pack_stream(codes, bits)
    packed = nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    # safetensors and the readers of this format are little-endian.
    return (packed if sys.byteorder == "little" else packed.view(-1, 4).flip(1).view_as(packed)).view(torch.int32)


def _layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def _stacked(model: nn.Module) -> str | None:
    """Return why compressed-tensors cannot hold a model with experts; None if there are none."""
    # Its readers expect an expert's gate and up projection separately, and dense weights in the layout of the original
    # checkpoint.
    name = next(iter(find_mixtures(model)), None)
    return None if name is None else f"{name} holds experts"


def _fold(model: PreTrainedModel, processor: Any) -> None:
    """Fold input scales into preceding layers, if all of them are powers of two."""
    packed = [layer for layer in _layers(model).values() if isinstance(layer, ScaledLinear)]
    scales = [layer.in_scale for layer in packed if layer.in_scale is not None]
    if not scales or not all(bool((scale.frexp().mantissa == 0.5).all()) for scale in scales):
        return
    image, expression = scene(np.random.default_rng(0))
    fold(model, {**to_model(encode(processor, image, f"Where is {expression}?"), model), "use_cache": False})


def _not_compressible(name: str, layer: QuantizedLinear) -> str | None:
    """Return why compressed-tensors cannot hold a layer; None if it can."""
    if input_rotation(layer) is not None:
        return ROTATED_INPUTS
    if getattr(layer, "in_scale", None) is not None:
        return f"{name} multiplies its input by a scale, which no layer before it could take over exactly"
    if type(layer) is not PackedLinear:
        return None if written_layer(layer) is not None else f"{name} is a {type(layer).__name__} ({layer.kernel})"
    if layer.padded_columns:
        return f"{name} has a width of {layer.in_features}, which its groups of {layer.group_size} do not divide"
    zero = layer.packed.codes(0, 1).zero_point
    return f"{name} has zero points that are no integers" if zero is not None and zero.is_floating_point() else None


def _group_size(layer: QuantizedLinear) -> int | None:
    return None if layer.group_size == layer.in_features else layer.group_size


def _scheme(layer: QuantizedLinear) -> tuple[str, dict[str, Any]]:
    """Return the format within compressed-tensors, and the arguments of weights and inputs."""
    written = written_layer(layer)
    if written is not None:
        return written.layout, {"weights": written.weights, "input_activations": written.inputs}
    assert isinstance(layer, PackedLinear)
    whole_row = layer.spec.group_size is None
    weights = {
        "num_bits": layer.bits,
        "type": "int",
        "symmetric": layer.spec.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else layer.group_size,
        "dynamic": False,
        "observer": "minmax",
    }
    return "pack-quantized", {"weights": weights, "input_activations": None}


def _own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}


def _compressed_tensors(model: PreTrainedModel, layers: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    kept = {f"{name}.bias" for name in layers}
    tensors = {
        name: tensor
        for name, tensor in _own_tensors(model).items()
        if name in kept or not any(part in layers for part in _owners(name))
    }
    for name, layer in layers.items():
        written = written_layer(layer)
        if written is not None:
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in written.tensors.items()}
            continue
        assert isinstance(layer, PackedLinear)
        codes, scale, zero = layer.quantized
        tensors[f"{name}.weight_packed"] = pack_words(codes.flatten(1), layer.bits)
        tensors[f"{name}.weight_scale"] = scale.contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
        if zero is not None:
            tensors[f"{name}.weight_zero_point"] = pack_words(zero.T.contiguous(), layer.bits).T.contiguous()
    return tensors


def _owners(name: str) -> tuple[str, str]:
    """Return the modules that a tensor may belong to: the one that holds it, and the one around that."""
    holder = name.rpartition(".")[0]
    return holder, holder.rpartition(".")[0]


def _write_config(model: PreTrainedModel, quantization: Mapping[str, Any], folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.quantization_config = dict(quantization)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)


def _generation_config(model: PreTrainedModel, processor: Any) -> GenerationConfig:
    """Return the checkpoint's generation config, which evaluation changes, with the end tokens of an evaluation."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model.config.name_or_path)
    except OSError:
        config = copy.deepcopy(model.generation_config)
    tokenizer = getattr(processor, "tokenizer", processor)
    config.eos_token_id = list(end_tokens(model, tokenizer)) or None
    return config


@contextmanager
def _whole_or_nothing(target: Path, option: str) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, which becomes `target` on success and is removed on failure."""
    try:
        with files.new_folder(target) as unfinished:
            yield unfinished
    except (SafetensorError, OSError) as error:
        said = one_line(error)
        raise OSError(f"{option}: {target} could not be written ({said}); nothing is left of it") from error
