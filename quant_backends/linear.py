"""The packed low-bit linear layer that every quantizer of this package stores its result in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.packing import pack, plane_bytes, plane_widths, unpack
from lmms_plugin.quant_backends.plan import QuantSpec


class Codes(NamedTuple):
    """A quantized weight in its canonical form: ``weight = (codes - zero_point) * scale``.

    Attributes:
        codes: (rows, groups, group_size) uint8 in [0, 2**bits); columns are padded with zeros of the
            weight to a whole number of groups.
        scale: (rows, groups), the dtype the layer computes in.
        zero_point: (rows, groups), uint8, or the scale's dtype for a real-valued zero. None means
            2**(bits - 1) everywhere.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self, bits: int, dtype: torch.dtype) -> Tensor:
        """Return the weight as (rows, groups * group_size), computed in `dtype`.

        Codes and integer zero points are exact in bfloat16, so their difference is too; the only
        rounding is that of the product.
        """
        weight = self.codes.to(dtype)
        if self.zero_point is None:
            weight -= 1 << (bits - 1)
        else:
            weight -= self.zero_point.to(dtype).unsqueeze(-1)
        weight *= self.scale.to(dtype).unsqueeze(-1)
        return weight.flatten(-2)


def rows_per_block(columns: int) -> int:
    """Return how many rows of a weight to work on at once: about a million elements, and at least one row."""
    return max(1, (1 << 20) // columns)


def split_groups(weight: Tensor, group_size: int | None) -> Tensor:
    """Cut the columns of a weight into groups, padding the last one with zeros.

    Args:
        weight: (rows, columns).
        group_size: Columns per group, None for all of them.

    Returns:
        (rows, groups, group_size).
    """
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    padding = -columns % size
    if padding:
        weight = functional.pad(weight, (0, padding))
    return weight.reshape(rows, -1, size)


class QuantizedLinear(nn.Module, ABC):
    """A linear layer that holds its weight in fewer bits: same input, same output as the ``nn.Linear`` it replaces.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bits: Bits per code, without scales and zero points.
        group_size: Columns that share a scale.
        bias: (out_features,), or None.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    bias: nn.Parameter | None

    @abstractmethod
    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight that this layer stands for, (stop - start, in_features), computed at each call."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of all that replaces the dense weight: codes, scales, zero points and the like."""

    @property
    def kernel(self) -> str:
        """What the forward pass runs on."""
        return "dequantize"

    @property
    def padded_columns(self) -> int:
        """Columns added so that groups are whole."""
        return -self.in_features % self.group_size

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features) that this layer stands for, computed at each call."""
        return self.dense_rows(0, self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class PackedLinear(QuantizedLinear):
    """A linear layer whose weight takes exactly `bits` bits, plus a scale and a zero point per group.

    It replaces an ``nn.Linear``: same input, same output, same bias. The forward pass dequantizes into
    the dtype of its input and multiplies.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        spec: Bits and group size; a symmetric spec stores no zero points.
        bias: Whether there is one.
        dtype: Of scale, bias and `in_scale`: the dtype the layer computes in.
        device: Where the buffers live.
        float_zero_point: Zero points are real numbers in `dtype` instead of uint8.
        with_in_scale: The input is multiplied by a vector first (activation-aware methods).
    """

    scale: Tensor
    zero_point: Tensor | None
    in_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        float_zero_point: bool = False,
        with_in_scale: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.bits = spec.bits
        self.group_size = in_features if spec.group_size is None else spec.group_size
        self.groups = -(-in_features // self.group_size)
        count = out_features * self.groups * self.group_size
        for width in plane_widths(spec.bits):
            self._add(f"plane_{width}", (plane_bytes(count, width),), torch.uint8, device)
        self._add("scale", (out_features, self.groups), dtype, device)
        zero_dtype = dtype if float_zero_point else torch.uint8
        self._add("zero_point", None if spec.symmetric else (out_features, self.groups), zero_dtype, device)
        self._add("in_scale", (in_features,) if with_in_scale else None, dtype, device)
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_codes(
        cls,
        quantized: Codes,
        spec: QuantSpec,
        in_features: int,
        *,
        bias: nn.Parameter | None = None,
        in_scale: Tensor | None = None,
    ) -> PackedLinear:
        """Pack a quantized weight.

        Args:
            quantized: Codes (rows, groups, group_size), scale and zero point.
            spec: Bits and group size that the codes were made for.
            in_features: Columns of the weight without padding.
            bias: Taken over as it is, shape (rows,).
            in_scale: (in_features,), multiplied into the input.
        """
        zero_point = quantized.zero_point
        layer = cls(
            in_features,
            quantized.codes.shape[0],
            spec,
            dtype=quantized.scale.dtype,
            device="meta",
            float_zero_point=zero_point is not None and zero_point.is_floating_point(),
            with_in_scale=in_scale is not None,
        )
        for width, plane in zip(plane_widths(spec.bits), pack(quantized.codes, spec.bits), strict=True):
            layer._fill(f"plane_{width}", plane)
        layer._fill("scale", quantized.scale)
        layer._fill("zero_point", zero_point)
        layer._fill("in_scale", in_scale)
        layer.bias = bias
        return layer

    @property
    def quantized(self) -> Codes:
        """The canonical form; the codes are unpacked at each call."""
        planes = [self.get_buffer(f"plane_{width}") for width in plane_widths(self.spec.bits)]
        shape = (self.out_features, self.groups, self.group_size)
        codes = unpack(planes, self.spec.bits, self.out_features * self.groups * self.group_size)
        return Codes(codes.view(shape), self.scale, self.zero_point)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales, zero points and input scale: all that replaces the dense weight."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, the input scale included, in the dtype of the scales."""
        stored = self.quantized
        zero_point = None if stored.zero_point is None else stored.zero_point[start:stop]
        rows = Codes(stored.codes[start:stop], stored.scale[start:stop], zero_point)
        weight = rows.dequantize(self.spec.bits, self.scale.dtype)[:, : self.in_features]
        return weight if self.in_scale is None else weight * self.in_scale

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the stored weight, (out_features, in_features), without the input scale."""
        return self.quantized.dequantize(self.spec.bits, dtype)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        if self.in_scale is not None:
            x = x * self.in_scale.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.dequantize(x.dtype), bias)

    def _add(
        self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype, device=device))

    def _fill(self, name: str, value: Tensor | None) -> None:
        expected = self._buffers[name]
        if (expected is None) != (value is None) or (
            expected is not None
            and value is not None
            and (expected.shape, expected.dtype) != (value.shape, value.dtype)
        ):
            raise ValueError(f"{name} of a packed {self} should be {_describe(expected)}, got {_describe(value)}")
        self._buffers[name] = None if value is None else value.detach().contiguous()


def _describe(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
