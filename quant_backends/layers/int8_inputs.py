"""Packed linear layers with 8-bit inputs (W8A8, W4A8)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from lmms_plugin.quant_backends.layers.input_rounding import TOKEN, InputRounding
from lmms_plugin.quant_backends.layers.kernels import Dequantize
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundedInputLinear

LARGEST = 127
"""Of an 8-bit code of an input; -128 is not used, so that codes are symmetric."""

EXACT_COLUMNS = 1024
"""So many products of two 8-bit codes add up to less than 2²⁴: float32 holds every partial sum exactly."""

INT8_TOKENS = InputRounding.of("int8", TOKEN)


class RoundedInputs(NamedTuple):
    """Quantized inputs x ≈ codes · scale.

    Attributes:
        codes: (rows, columns) int8, -127 to 127.
        scale: (rows, 1) float32.
    """

    codes: Tensor
    scale: Tensor


def round_inputs(x: Tensor) -> RoundedInputs:
    """Round each row of x (rows, columns) to 8 bits: symmetric, with its largest magnitude mapped to 127."""
    found = INT8_TOKENS.encode(x.float())
    # Offset binary to two's complement, which wraps around to the same bits.
    return RoundedInputs((found.codes - 128).view(torch.int8), found.scale)


class Int8InputLinear(RoundedInputLinear):
    """Packed linear layer whose inputs are rounded to int8, each token by its own largest magnitude.

    With one scale per row of the weight (``group_size=-1``) the product is one of integers: by torch's own where that
    is fast (CUDA; processors with VNNI), and elsewhere in float32, in pieces so short that every sum is exact. Both
    give the same integers. Scales per group prevent integer sums across groups; the rounded inputs are then multiplied
    with the dequantized weight in float32.
    """

    rounding = INT8_TOKENS

    @property
    def kernel(self) -> str:
        """Return what the forward pass runs on."""
        if self._grouped:
            return f"8-bit inputs, {self.multiplied()}"
        made = "torch._int_mm" if self._native else "integers in float32"
        return f"8-bit inputs, {made}" + (", unpacked" if self._keeps else "")

    @property
    def operand_dtype(self) -> torch.dtype:
        """Return the dtype in which products read the weight; of integers, those that torch multiplies fast."""
        return torch.int8 if self._native and not self._grouped else torch.float32

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight, or with one scale per row of its codes less the middle one, which is exact."""
        if self._grouped:
            return super().operand(start, stop, dtype)
        codes = self.packed.codes(start, stop).codes.flatten(1)[:, : self.in_features]
        # uint8 wraps around to the int8 value with the same bits, which is the intended one.
        return (codes - (1 << (self.bits - 1))).view(torch.int8).to(dtype).contiguous()

    @property
    def _grouped(self) -> bool:
        return self.group_size < self.in_features

    @property
    def _native(self) -> bool:
        return has_integer_product(self.in_features, self.out_features, self.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``round(x) @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        rows = x.reshape(-1, self.in_features).float()
        if self.in_scale is not None:
            rows = rows * self.in_scale.float()
        codes, scale = round_inputs(rows)
        y = (self.product(codes.float()) if self._grouped else self._integer_outputs(codes)) * scale
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _integer_outputs(self, inputs: Tensor) -> Tensor:
        """Return Σ input code · (weight code − zero point) · weight scale, (rows, out_features) float32."""
        assert isinstance(self.packed, Dequantize)
        weight = self.operand(0, self.out_features, self.operand_dtype) if self.kept is None else self.kept
        product, zero = integer_product(inputs, weight), self.packed.zero_point
        if zero is not None:
            offset = (1 << (self.bits - 1)) - zero[:, 0].to(torch.int32)
            product += inputs.sum(1, keepdim=True, dtype=torch.int32) * offset
        return product.float() * self.packed.scale[:, 0].float()


def has_integer_product(columns: int, rows: int, device: torch.device) -> bool:
    """Return whether torch multiplies int8 matrices fast there; its fallback for plain processors is slow."""
    if device.type == "cuda":
        return columns % 8 == 0 and rows % 8 == 0
    return device.type == "cpu" and _cpu_product_is_exact()


@cache
def _cpu_product_is_exact() -> bool:
    # Without VNNI (ONEDNN_MAX_CPU_ISA), oneDNN saturates sums of two products at 16 bits.
    largest = torch.full((32, 32), LARGEST, dtype=torch.int8)
    return torch.cpu._is_vnni_supported() and bool((torch._int_mm(largest, largest) == 32 * LARGEST**2).all())


def integer_product(inputs: Tensor, weight: Tensor, *, native: bool | None = None) -> Tensor:
    """Return inputs · weightᵀ without any rounding.

    Args:
        inputs: (tokens, columns) int8.
        weight: (rows, columns), integers of an int8 in int8, or in float32 if `native` is not so; with no more than
            2¹⁶ columns.
        native: Whether to use torch's product of integers; None where it is fast.

    Returns:
        (tokens, rows) int32.
    """
    if native is None:
        native = has_integer_product(weight.shape[1], weight.shape[0], weight.device)
    if native:
        # cuBLAS needs more than 16 rows, in multiples of 8.
        missing = max(24 - len(inputs), -len(inputs) % 8) if weight.device.type == "cuda" else 0
        padded = functional.pad(inputs, (0, 0, 0, missing))
        return torch._int_mm(padded, weight.T)[: len(inputs)]
    product = torch.zeros(len(inputs), len(weight), dtype=torch.int32, device=weight.device)
    for one, other in zip(inputs.split(EXACT_COLUMNS, 1), weight.split(EXACT_COLUMNS, 1), strict=True):
        product += (one.float() @ other.float().T).to(torch.int32)
    return product
