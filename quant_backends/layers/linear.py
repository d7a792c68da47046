"""Packed low-bit linear layer, in which every quantizer of this package stores its result."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes, columns_per_group, rows_per_block, split_groups
from lmms_plugin.quant_backends.layers.dense_products import DenseProducts
from lmms_plugin.quant_backends.layers.kernel_choice import fastest
from lmms_plugin.quant_backends.layers.kernels import FEW_ROWS, Dequantize, Kernel, arithmetic_dtype
from lmms_plugin.quant_backends.plans.plan import QuantSpec

__all__ = ["Codes", "PackedLinear", "QuantizedLinear", "rows_per_block", "split_groups"]


class QuantizedLinear(nn.Module, ABC):
    """Linear layer with a low-bit weight: same input, same output as the ``nn.Linear`` it replaces.

    Attributes:
        in_features: Number of columns of the weight.
        out_features: Number of rows of the weight.
        bits: Number of bits per code, without scales and zero points.
        group_size: Number of columns that share a scale.
        bias: Bias (out_features,), or None.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    bias: nn.Parameter | None

    @abstractmethod
    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the dequantized weight, (stop - start, in_features), computed at each call."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Return the bytes of all that replaces the dense weight: codes, scales, zero points and the like."""

    @property
    def kernel(self) -> str:
        """Return what the forward pass runs on."""
        return "dequantize"

    @property
    def padded_columns(self) -> int:
        """Return the number of columns added to make groups whole."""
        return -self.in_features % self.group_size

    @property
    def weight(self) -> Tensor:
        """Return the dequantized weight (out_features, in_features), computed at each call."""
        return self.dense_rows(0, self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class _Plain(NamedTuple):
    """What a layer needs besides its dense weight where its product is one of torch's.

    At batch 1 a product takes as long as a few dozen calls of Python, so that looking everything up for each one would
    be felt.

    Attributes:
        dtype: Dtype of the inputs, and of the bias.
        elements: Largest number of elements of the inputs.
        bias: Bias; None for none.
    """

    dtype: torch.dtype
    elements: int
    bias: Tensor | None


class PackedLinear(DenseProducts, QuantizedLinear):
    """Linear layer whose weight takes exactly `bits` bits, plus a scale and a zero point per group.

    It replaces an ``nn.Linear``: same input, same output, same bias. Codes are held once, in the layout of the best
    available kernel for bits, group size, dtype and device (`lmms_plugin.quant_backends.layers.kernels`). That layout
    replaces the canonical one when the layer is first used or its kernel is queried; the canonical layout returns when
    the layer is moved, and a state dict always holds the canonical one. While a model answers, dense rows may be kept
    beside the codes (`keep`).

    Args:
        in_features: Number of columns of the weight.
        out_features: Number of rows of the weight.
        spec: Bits and group size; a symmetric spec stores no zero points.
        bias: Whether there is a bias.
        dtype: Dtype of scale, bias and `in_scale`, in which the layer computes.
        device: Device of the buffers.
        float_zero_point: Whether zero points are real numbers in `dtype` instead of uint8.
        with_in_scale: Whether the input is multiplied by a vector first (activation-aware methods).
    """

    coded = ("plane_",)

    packed: Kernel
    in_scale: Tensor | None
    _plain: _Plain | None = None

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
        self.group_size = columns_per_group(spec.group_size, in_features)
        self.packed = Dequantize(
            spec.bits,
            out_features,
            in_features + self.padded_columns,
            self.group_size,
            symmetric=spec.symmetric,
            float_zero_point=float_zero_point,
            dtype=dtype,
            device=device,
        )
        in_scale = torch.empty(in_features, dtype=dtype, device=device) if with_in_scale else None
        self.register_buffer("in_scale", in_scale)
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        self._chosen = False
        self.kernel_rows = 0

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
            in_features: Number of columns of the weight without padding.
            bias: Bias (rows,), kept unchanged.
            in_scale: Factors (in_features,) of the input columns.

        Raises:
            ValueError: Codes, scale, zero point and input scale do not fit each other or `spec`.
        """
        layer = cls(in_features, quantized.codes.shape[0], spec, dtype=quantized.scale.dtype, device="meta")
        layer._expect(quantized, in_scale)
        layer.packed = Dequantize.from_codes(quantized, spec.bits)
        layer.in_scale = None if in_scale is None else in_scale.detach().contiguous()
        layer.bias = bias
        return layer

    def choose_kernel(self) -> None:
        """Convert the weight to the layout of the best kernel for its device and dtype."""
        if not self._chosen:
            self.packed = fastest(self.packed)
            self._chosen = True

    def keep(self, kernel_rows: int = 0) -> None:
        """Keep the dense weight from now on.

        Args:
            kernel_rows: Number of rows of inputs up to which the kernel multiplies all the same; with 0 codes return to
                the canonical layout.
        """
        self.kernel_rows = kernel_rows
        if not kernel_rows:
            self.packed, self._chosen = self.packed.canonical(), True
        super().keep()

    def _make(self) -> None:
        super()._make()
        self._plain = None
        same = self.bias is None or self.bias.dtype == self.dtype
        if same and self.in_scale is None and not self.kernel_rows and self._is_one_block:
            native = arithmetic_dtype(self.dtype, self.device.type) == self.dtype
            elements = sys.maxsize if native else FEW_ROWS * self.in_features
            self._plain = _Plain(self.dtype, elements, None if self.bias is None else self.bias.detach())

    def drop(self) -> None:
        """Keep the dense weight no longer."""
        self._plain = None
        super().drop()
        self._canonicalize()

    @property
    def kernel(self) -> str:
        """Return what the forward pass runs on."""
        self.choose_kernel()
        kernel = self.multiplied(self.packed.name)
        return f"{self.packed.name} up to {self.kernel_rows} rows, {kernel}" if self.kernel_rows else kernel

    @property
    def quantized(self) -> Codes:
        """Return the canonical form, unpacked at each call."""
        return self.packed.codes(0, self.out_features)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of scales and input scale, in which the layer computes."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        """Return the device where the layer computes."""
        return self.packed.device

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight as products read them, without input scale and padding."""
        return self.packed.dense(start, stop, self.in_features, dtype)

    @property
    def operand_dtype(self) -> torch.dtype:
        """Return the dtype in which products read the weight."""
        return self.dtype

    @property
    def resident_bytes(self) -> int:
        """Return the bytes on the device where the layer computes, those that its kernel repeats included."""
        return super().resident_bytes + self.packed.extra_bytes

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of codes, scales, zero points and input scale: all that replaces the dense weight."""
        self.choose_kernel()
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, the input scale included, in the dtype of the scales."""
        weight = self.packed.codes(start, stop).dequantize(self.bits, self.dtype)[:, : self.in_features]
        return weight if self.in_scale is None else weight * self.in_scale

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the stored weight, (out_features, in_features), without the input scale."""
        return self.quantized.dequantize(self.bits, dtype)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        plain = self._plain
        if plain is not None and self._kept is not None and x.dtype is plain.dtype and x.numel() <= plain.elements:
            return functional.linear(x, self._kept, plain.bias)
        if self.in_scale is not None:
            x = x * self.in_scale.to(x.dtype)
        if not self._keeps or x.numel() <= self.kernel_rows * self.in_features:
            self.choose_kernel()
            if self.packed.takes_rows(x.numel() // self.in_features, x.dtype):
                y = self.packed.matmul(x.reshape(-1, self.in_features))
                if self.bias is not None:
                    y += self.bias.to(y.dtype)
                return y.view(*x.shape[:-1], self.out_features)
        return self.product(x, self.bias)

    def _canonicalize(self) -> None:
        self.packed = self.packed.canonical()
        self._chosen, self.kernel_rows = self._keeps, 0

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        # A moved weight may need another kernel.
        self._canonicalize()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._canonicalize()
        super()._load_from_state_dict(*args, **kwargs)

    def _expect(self, quantized: Codes, in_scale: Tensor | None) -> None:
        codes, scale, zero = quantized
        groups = (self.out_features, (self.in_features + self.padded_columns) // self.group_size)
        _expect_shape(self, "codes", codes, (*groups, self.group_size), (torch.uint8,))
        _expect_shape(self, "scale", scale, groups, (scale.dtype,))
        if (zero is None) != self.spec.symmetric:
            raise ValueError(
                f"symmetric={self.spec.symmetric}, but the zero points are {'' if zero is None else 'not '}None"
            )
        if zero is not None:
            _expect_shape(self, "zero_point", zero, groups, (torch.uint8, scale.dtype))
        if in_scale is not None:
            _expect_shape(self, "in_scale", in_scale, (self.in_features,), (scale.dtype,))


def _expect_shape(
    layer: PackedLinear, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise ValueError(
            f"{name} of a packed layer ({layer.extra_repr()}) should be {shape} {' or '.join(map(str, dtypes))}, "
            f"got {tuple(tensor.shape)} {tensor.dtype}"
        )
