"""Storage formats of other tools for quantized linear layers, converted to the canonical form of this package.

Each format is recognised by its tensors: a layer is quantized where they are, whatever the checkpoint's own list of
layers says (such lists use the module names of the time when the checkpoint was made, and may silently match nothing
today).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes, columns_per_group
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes
from lmms_plugin.quant_backends.layers.input_rounding import InputRounding
from lmms_plugin.quant_backends.plans.specs import is_int

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's "GEMM" packing: column k of eight lies in nibble AWQ_ORDER.index(k) of its word."""

UNNAMED_GROUP_SIZE = 128
"""What transformers takes for the group size of GPTQ, AWQ and auto-round where a config names none."""


class Scheme(NamedTuple):
    """Storage of some layers, as a config describes it.

    Attributes:
        bits: Number of bits per weight.
        group_size: Number of columns that share a scale; None for whole rows.
    """

    bits: int
    group_size: int | None


class StoredLinear(NamedTuple):
    """Layer as read.

    Attributes:
        codes: Canonical form; its groups are runs of columns in the order of `order`.
        bits: Number of bits per code.
        order: (columns,) input column of each stored column; None for the natural order.
        rounding: Rounding of the layer's inputs; None for none.
        static: Static scale of the inputs, for a static rounding.
    """

    codes: Codes | FormatCodes
    bits: int
    order: Tensor | None
    rounding: InputRounding | None = None
    static: Tensor | None = None


@dataclass(frozen=True)
class StoredFormat(ABC):
    """Storage format of quantized layers.

    Attributes:
        marker: Tensor that only layers in this format have.
        tensors: All tensors that such a layer may have besides the bias.
        label: Name in reports.
    """

    marker: ClassVar[str]
    tensors: ClassVar[frozenset[str]]
    label: str

    @property
    def markers(self) -> frozenset[str]:
        """Return the tensors of which a layer in this format has at least one."""
        return frozenset({self.marker})

    def of_layer(self, names: Sequence[str], dense: nn.Module) -> StoredFormat:
        """Return the format of one layer: this one, since all have the same.

        Args:
            names: Its names, in the checkpoint and in the model.
            dense: Layer of the model.
        """
        return self

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer.

        Args:
            tensors: Name below the layer -> tensor.
            columns: Number of input columns of the layer.

        Raises:
            ValueError: The tensors are inconsistent, or hold what the packed layer cannot.
        """


@dataclass(frozen=True)
class CompressedTensors(StoredFormat):
    """``pack-quantized`` format of compressed-tensors (llm-compressor, vLLM): integer weights, packed along rows.

    Attributes:
        schemes: Schemes named in the checkpoint's config.
    """

    marker = "weight_packed"
    tensors = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"})

    schemes: frozenset[Scheme]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer."""
        packed, scale = tensors["weight_packed"], tensors["weight_scale"]
        rows = packed.shape[0]
        shape = tensors.get("weight_shape")
        if shape is not None and shape.tolist() != [rows, columns]:
            raise ValueError(f"stored as {shape.tolist()}, the model has {[rows, columns]}")
        # A single scale for the whole weight is repeated for each of its rows.
        scale = scale.reshape(-1, scale.shape[-1] if scale.dim() > 1 else 1).expand(rows, -1)
        bits, dense = self._layout(packed.shape[1], scale.shape[1], columns)
        codes = _unpack(packed, bits, columns, dense=dense)
        zeros = tensors.get("weight_zero_point")
        if zeros is not None and zeros.dtype is torch.int32:
            zeros = _unpack(zeros.T.contiguous(), bits, rows, dense=dense).T
        elif zeros is not None:
            zeros = (zeros.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        zeros = None if zeros is None else zeros.reshape(-1, zeros.shape[-1] if zeros.dim() > 1 else 1).expand(rows, -1)
        sizes = frozenset(scheme.group_size for scheme in self.schemes if scheme.bits == bits)
        return _group(codes, scale, zeros, bits, sizes, tensors.get("weight_g_idx"))

    def _layout(self, words: int, groups: int, columns: int) -> tuple[int, bool]:
        """Return the bits, and whether codes cross word boundaries, as they do since compressed-tensors 0.20."""
        widths = {scheme.bits for scheme in self.schemes if _groups(scheme.group_size, columns) == groups}
        across = {bits for bits in widths if words == -(-columns * bits // 32)}
        within = {bits for bits in widths if words == -(-columns // (32 // bits))}
        fitting = sorted(across or within)
        if len(fitting) != 1:
            raise ValueError(
                f"{words} words and {groups} groups for {columns} columns fit {len(fitting)} of the schemes that its "
                f"config names ({_listed(self.schemes)}); one was expected"
            )
        return fitting[0], bool(across)


@dataclass(frozen=True)
class Gptq(StoredFormat):
    """GPTQ's format (AutoGPTQ, GPTQModel, auto-round): integer weights, packed along columns, transposed.

    Attributes:
        zero_offset: Number subtracted from each stored zero point: 1 in version 1 of the format, 0 in version 2.
        group_sizes: Group sizes named in the checkpoint's config, None for whole rows.
    """

    marker = "qweight"
    tensors = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    zero_offset: int
    group_sizes: frozenset[int | None]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer."""
        packed, scale = tensors["qweight"], tensors["scales"]
        rows = scale.shape[1]
        bits, rest = divmod(packed.shape[0] * 32, columns)
        if rest or packed.shape[1] != rows or not 2 <= bits <= 8:
            raise ValueError(
                f"qweight {tuple(packed.shape)} and scales {tuple(scale.shape)} do not fit a width {columns}"
            )
        codes = _unpack(packed.T.contiguous(), bits, columns, dense=True)
        zeros = _unpack(tensors["qzeros"], bits, rows, dense=True).T
        # The offset wraps: a zero point of 0 is stored as the largest code.
        zeros = ((zeros.to(torch.int16) + self.zero_offset) % (1 << bits)).to(torch.uint8)
        return _group(codes, scale.T, zeros, bits, self.group_sizes, tensors.get("g_idx"))


@dataclass(frozen=True)
class Awq(StoredFormat):
    """AWQ's "GEMM" format (AutoAWQ, llm-awq): 4-bit weights, eight outputs in a word, interleaved.

    Attributes:
        group_sizes: Group sizes named in the checkpoint's config, None for whole rows.
    """

    marker = "qweight"
    tensors = frozenset({"qweight", "qzeros", "scales"})

    group_sizes: frozenset[int | None]

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer."""
        packed, scale = tensors["qweight"], tensors["scales"]
        rows = scale.shape[1]
        if packed.shape != (columns, rows // 8):
            raise ValueError(f"qweight {tuple(packed.shape)}, expected {(columns, rows // 8)} of 4 bits per weight")
        codes, zeros = _interleaved(packed).T, _interleaved(tensors["qzeros"]).T
        return _group(codes, scale.T, zeros, 4, self.group_sizes)


@dataclass(frozen=True)
class Hqq(StoredFormat):
    """Format of ``HQQLinear.state_dict()``: the library's own packing, real-valued zeros."""

    marker = "W_q"
    tensors = frozenset(
        {
            *("W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing", "unpack_view_dtype"),
            *("view_as_float", "compute_dtype", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict"),
            *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
        }
    )

    def read(self, tensors: Mapping[str, Tensor], columns: int) -> StoredLinear:
        """Convert one layer, unpacked by the library."""
        from hqq.core.quantize import HQQLinear, Quantizer

        scale = tensors["scale"]
        layer = HQQLinear(None, None, compute_dtype=scale.dtype, device=str(scale.device), initialize=False)
        layer.load_state_dict(dict(tensors))
        meta = layer.meta
        rows, width = meta["shape"]
        group_size = meta["group_size"] or width
        if meta["axis"] != 1 or width != columns or columns % group_size:
            raise ValueError(
                f"HQQ layer of {rows} x {width} in groups of {group_size} along axis {meta['axis']}: only groups along "
                f"the rows (axis=1) that divide the width {columns} can be packed"
            )
        stored = layer.W_q.data
        if meta["view_as_float"]:
            stored = stored.view(meta["unpack_view_dtype"])
        codes = Quantizer.unpack[meta["packing"]](stored, dtype=torch.uint8)
        # Three bits are packed ten to a word, the last word padded.
        codes = codes.flatten()[: rows * columns].view(rows, columns)
        scale, zero = (meta[key].reshape(rows, -1) for key in ("scale", "zero"))
        return _group(codes, scale, zero, int(meta["nbits"]), frozenset({group_size}))


def stored_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format that a checkpoint's ``quantization_config`` names; None if this module does not read it.

    Raises:
        ValueError: The config names a supported format, but not the group size that it needs.
    """
    method = config.get("quant_method")
    if method == "compressed-tensors" and config.get("format") == "pack-quantized":
        groups = list((config.get("config_groups") or {}).values())
        if not groups or not all(packs_weights_alone(group) for group in groups):
            return None
        return CompressedTensors(method, frozenset(_scheme(group["weights"]) for group in groups))
    packing = str(config.get("packing_format", ""))
    if method == "gptq" or (method == "auto-round" and not packing.endswith("awq")):
        second = config.get("checkpoint_format") == "gptq_v2" or (
            method == "auto-round" and ("gptq" not in packing or "gptqmodel" in packing)
        )
        return Gptq(str(method), 0 if second else 1, _group_sizes(config))
    if (method == "awq" and str(config.get("version", "gemm")).lower() == "gemm") or method == "auto-round":
        return Awq(str(method), _group_sizes(config))
    return Hqq("hqq") if method == "hqq" else None


def quantization_of(config: Any) -> dict[str, Any]:
    """Return a checkpoint's ``quantization_config``, of the model or of its language model; empty if there is none."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())
    return {}


def stored_integers(group: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format of one config group in ``pack-quantized``; None if it rounds inputs or is none of integers.

    Raises:
        ValueError: It names no group size where one is needed.
    """
    named = frozenset({_scheme(group["weights"])}) if packs_weights_alone(group) else None
    return None if named is None else CompressedTensors("compressed-tensors", named)


def packs_weights_alone(group: Any) -> bool:
    """Return whether a config group has integer weights, and inputs as they are."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return (
        isinstance(weights, Mapping)
        and weights.get("type", "int") == "int"
        and weights.get("strategy") in ("tensor", "channel", "group")
        and not group.get("input_activations")
    )


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    if weights["strategy"] != "group":
        return Scheme(weights["num_bits"], None)
    size = weights.get("group_size")
    if not is_int(size) or size < 1:
        raise ValueError(f"compressed-tensors: strategy 'group' should name a group_size of at least 1, got {size!r}")
    return Scheme(weights["num_bits"], size)


def _group_sizes(config: Mapping[str, Any]) -> frozenset[int | None]:
    """Return the group sizes that a config of GPTQ, AWQ or auto-round names, for all layers or for single ones."""
    # Per-layer exceptions: GPTQModel's by regular expression, auto-round's by name.
    exceptions = [*(config.get("dynamic") or {}).values(), *(config.get("extra_config") or {}).values()]
    named = [config.get("group_size", UNNAMED_GROUP_SIZE)]
    named += [entry["group_size"] for entry in exceptions if isinstance(entry, Mapping) and "group_size" in entry]
    wrong = [size for size in named if size is not None and not is_int(size)]
    if wrong:
        raise ValueError(f"{config.get('quant_method')}: group_size should be a whole number, got {wrong[0]!r}")
    return frozenset(size if size is not None and size > 0 else None for size in named)


def _groups(size: int | None, columns: int) -> int:
    """Return the number of groups per row; the last one may be narrower."""
    return -(-columns // columns_per_group(size, columns))


def _group(
    codes: Tensor,
    scale: Tensor,
    zeros: Tensor | None,
    bits: int,
    sizes: frozenset[int | None],
    index: Tensor | None = None,
) -> StoredLinear:
    """Cut (rows, columns) codes into the groups of their scales, (rows, groups).

    Args:
        codes: (rows, columns) uint8.
        scale: (rows, groups).
        zeros: (rows, groups) or None.
        bits: Number of bits per code.
        sizes: Group sizes named in the checkpoint's config. The number of groups is ambiguous: two groups in 192
            columns have 96 columns each, or 128 and a narrower last one.
        index: (columns,) group of each column, for columns grouped by activation order.

    Raises:
        ValueError: None of the sizes fits, or more than one does.
    """
    rows, columns = codes.shape
    groups = scale.shape[1]
    fitting = {columns_per_group(size, columns) for size in sizes if _groups(size, columns) == groups}
    order = None
    # llm-compressor writes -1 where columns are in their own order.
    if index is not None and not bool((index < 0).any()):
        order = torch.argsort(index.long(), stable=True)
        found = index.long()[order].cpu()
        fitting = {size for size in fitting if torch.equal(found, torch.arange(columns) // size)}
    if len(fitting) != 1:
        raise ValueError(
            f"its {columns} columns in {groups} groups{'' if order is None else ' by g_idx'} fit {len(fitting)} of the "
            f"group sizes that its config names ({_listed(sizes)}); one was expected"
        )
    size = fitting.pop()
    if order is not None:
        if torch.equal(order.cpu(), torch.arange(columns)):
            order = None
        else:
            codes = codes[:, order]
    codes = torch.nn.functional.pad(codes, (0, groups * size - columns))
    zeros = None if zeros is None else zeros.contiguous()
    return StoredLinear(Codes(codes.reshape(rows, groups, size).contiguous(), scale.contiguous(), zeros), bits, order)


def _listed(named: frozenset[int | None] | frozenset[Scheme]) -> str:
    def shown(entry: int | Scheme | None) -> str:
        if isinstance(entry, Scheme):
            return f"{entry.bits} bits in {shown(entry.group_size)}"
        return "whole rows" if entry is None else str(entry)

    return ", ".join(sorted(map(shown, named)))


def _unpack(words: Tensor, bits: int, count: int, *, dense: bool) -> Tensor:
    """Return the first `count` codes of each row of int32 words, (rows, count) uint8, lowest bits first.

    Args:
        words: (rows, words per row) int32.
        bits: Number of bits per code.
        count: Number of codes per row.
        dense: Whether codes cross word boundaries; otherwise the top bits of a word that hold no whole code are unused.
    """
    rows = words.shape[0]
    per_word = 32 // bits
    if dense and 32 % bits:
        places = torch.arange(32, dtype=torch.int32, device=words.device)
        stream = ((words.unsqueeze(-1) >> places) & 1).to(torch.uint8).view(rows, -1)
        stream = stream[:, : count * bits].view(rows, count, bits)
        weights = (1 << torch.arange(bits, device=words.device)).to(torch.uint8)
        return (stream * weights).sum(-1, dtype=torch.uint8)
    places = bits * torch.arange(per_word, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> places) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :count]


def _interleaved(words: Tensor) -> Tensor:
    """Unpack AWQ's words, (n, m) int32 -> (n, 8 m) uint8."""
    nibbles = _unpack(words, 4, words.shape[1] * 8, dense=False).view(words.shape[0], -1, 8)
    natural = [AWQ_ORDER.index(column) for column in range(8)]
    return nibbles[:, :, natural].reshape(words.shape[0], -1)
