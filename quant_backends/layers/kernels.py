"""Kernels that multiply with a packed weight, each with its own layout of codes.

A layer holds its codes in one layout only. `kernel_choice.fastest` replaces the canonical one by that of the best
available kernel; every layout gives the canonical codes back exactly, so that a layer can be moved, saved and inspected
afterwards.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.packing import pack, plane_bytes, plane_widths, unpack

BLOCK_ELEMENTS = {"cpu": 1 << 21}
"""Of a weight that is dequantized at a time, by type of device."""
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 26


FEW_ROWS = 4
"""Rows of inputs up to which a 16-bit product is left to torch where the processor has no 16-bit arithmetic.

For so few torch takes no longer than reading the weight does; for more, widening weights to float32 is several times
faster. Fixed as `MOST_ROWS` is.
"""

MOST_ROWS = {"torch CPU int4": 64, "torch CPU int8": 16, "torch CUDA int4": 16, "gemlite": 1 << 20}
"""Rows of activations up to which a kernel beats dequantizing once and one large product.

Measured by `python -m bench.decode --rows` on an AVX2 processor; those for CUDA are not
measured, and gemlite has kernels for any number. They are fixed, not
timed on the spot, so that the same inputs give the same answers in every run.
"""


class Shape(NamedTuple):
    """Properties of a weight that decide which kernels support it.

    Attributes:
        bits: Number of bits per code.
        rows: Number of rows of the weight.
        columns: Number of columns, padding included.
        group_size: Number of columns that share a scale.
        dtype: Dtype of scales and activations.
        device: Type of the device, ``cpu`` or ``cuda``.
    """

    bits: int
    rows: int
    columns: int
    group_size: int
    dtype: torch.dtype
    device: str


class Kernel(nn.Module, ABC):
    """Quantized weight in the layout of one kernel; all tensors are buffers.

    Attributes:
        name: Name of the kernel in reports.
        scales: Name of the buffer that holds the scales.
        reproducible: Whether the same inputs always give the same product, to the last bit.
        bits: Number of bits per code.
        rows: Number of rows of the weight.
        columns: Number of columns, padding included.
        group_size: Number of columns that share a scale.
    """

    name: ClassVar[str]
    reproducible: ClassVar[bool] = True
    scales: ClassVar[str] = "scale"
    bits: int
    rows: int
    columns: int
    group_size: int

    @classmethod
    @abstractmethod
    def takes(cls, shape: Shape) -> bool:
        """Return whether this kernel is available and supports such weights."""

    @classmethod
    @abstractmethod
    def from_codes(cls, codes: Codes, bits: int) -> Kernel:
        """Convert a weight to this kernel's layout."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> Codes:
        """Return some rows in the canonical form, exactly as they were given."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``.

        Args:
            x: (n, columns), in any floating dtype; columns of padding may be missing.
        """

    def takes_rows(self, rows: int, dtype: torch.dtype) -> bool:
        """Return whether `matmul` runs on the kernel itself for so many rows of inputs, and not through dense rows."""
        return rows <= MOST_ROWS.get(self.name, 0) and dtype == self.dtype

    @property
    def groups(self) -> int:
        """Return the number of groups per row."""
        return self.columns // self.group_size

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the scales, in which the layer computes."""
        return self.get_buffer(self.scales).dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weight."""
        return self.get_buffer(self.scales).device

    @property
    def shape(self) -> Shape:
        """Return what decides which other kernels support this weight."""
        return Shape(self.bits, self.rows, self.columns, self.group_size, self.dtype, self.device.type)

    def canonical(self) -> Dequantize:
        """Return the weight in the canonical layout."""
        return Dequantize.from_codes(self.codes(0, self.rows), self.bits)

    def dense(self, start: int, stop: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight without padding, (stop - start, columns), contiguous."""
        return self.codes(start, stop).dequantize(self.bits, dtype)[:, :columns].contiguous()

    def dequantized_matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` through dense rows, a block of them at a time.

        The weight is rounded once, to the dtype of the inputs.
        """
        return product_by_blocks(x, self.rows, lambda start, stop: self.dense(start, stop, x.shape[-1], x.dtype), None)

    @property
    def extra_bytes(self) -> int:
        """Return the bytes on the device that are no buffers, since they repeat these."""
        return 0

    def padded(self, x: Tensor) -> Tensor:
        """Return inputs (n, columns without padding) with as many columns as the stored weight has."""
        missing = self.columns - x.shape[1]
        return functional.pad(x, (0, missing)) if missing else x

    def _describe(self, bits: int, codes: Codes) -> None:
        self.bits = bits
        self.rows, groups, self.group_size = codes.codes.shape
        self.columns = groups * self.group_size

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Files hold the canonical layout: a kernel's own layout depends on the machine.
        self.canonical()._save_to_state_dict(destination, prefix, keep_vars)


class Dequantize(Kernel):
    """Canonical layout, bit planes of exactly N bits per weight, multiplied through dense rows.

    Args:
        bits: Number of bits per code.
        rows: Number of rows of the weight.
        columns: Number of columns, padding included.
        group_size: Number of columns that share a scale.
        symmetric: Whether there are no zero points.
        float_zero_point: Whether zero points are real numbers in `dtype` instead of uint8.
        dtype: Dtype of the scales.
        device: Device of the buffers.
    """

    name = "dequantize"
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        bits: int,
        rows: int,
        columns: int,
        group_size: int,
        *,
        symmetric: bool,
        float_zero_point: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.bits, self.rows, self.columns, self.group_size = bits, rows, columns, group_size
        for width in plane_widths(bits):
            plane = torch.empty(rows, plane_bytes(columns, width), dtype=torch.uint8, device=device)
            self.register_buffer(f"plane_{width}", plane)
        self.register_buffer("scale", torch.empty(rows, self.groups, dtype=dtype, device=device))
        zero_dtype = dtype if float_zero_point else torch.uint8
        zero = None if symmetric else torch.empty(rows, self.groups, dtype=zero_dtype, device=device)
        self.register_buffer("zero_point", zero)

    @classmethod
    def takes(cls, shape: Shape) -> bool:
        """Return True: this kernel supports every weight."""
        return True

    @classmethod
    def from_codes(cls, codes: Codes, bits: int) -> Dequantize:
        """Pack a weight."""
        rows, groups, group_size = codes.codes.shape
        zero = codes.zero_point
        made = cls(
            bits,
            rows,
            groups * group_size,
            group_size,
            symmetric=zero is None,
            float_zero_point=zero is not None and zero.is_floating_point(),
            dtype=codes.scale.dtype,
            device="meta",
        )
        for width, plane in zip(plane_widths(bits), pack(codes.codes.flatten(1), bits), strict=True):
            setattr(made, f"plane_{width}", plane)
        made.scale = codes.scale.detach().contiguous()
        made.zero_point = None if zero is None else zero.detach().contiguous()
        return made

    def codes(self, start: int, stop: int) -> Codes:
        """Return some rows in the canonical form."""
        planes = [self.get_buffer(f"plane_{width}")[start:stop] for width in plane_widths(self.bits)]
        # Planes may lie in host memory, where dense weights are kept on the device.
        codes = unpack(planes, self.bits, self.columns).view(-1, self.groups, self.group_size).to(self.device)
        zero = None if self.zero_point is None else self.zero_point[start:stop]
        return Codes(codes, self.scale[start:stop], zero)

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``."""
        return self.dequantized_matmul(x)

    def canonical(self) -> Dequantize:
        """Return itself."""
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


def default_dtype(device: str) -> torch.dtype:
    """Return the default dtype of unquantized weights and of the arithmetic."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@functools.cache
def arithmetic_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype in which a product of dense weights is fastest: float32 where 16 bits are emulated."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if native[dtype]() else torch.float32


def product_by_blocks(x: Tensor, rows: int, dense: Callable[[int, int], Tensor], bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, with a block of the weight's rows at a time.

    The blocks depend on sizes and device alone: whether a weight is made for the product or kept, the product is the
    same to the last bit.

    Args:
        x: (..., columns).
        rows: Number of rows of the weight.
        dense: Function from the first row of a block and the row behind its last to these rows, in the dtype of `x`.
        bias: (rows,), in the dtype of `x`.
    """
    step = rows_at_once(x.shape[-1], x.device.type)
    if rows <= step:
        return linear(x, dense(0, rows), bias)
    parts = [
        linear(x, dense(start, min(start + step, rows)), None if bias is None else bias[start : start + step])
        for start in range(0, rows, step)
    ]
    return torch.cat(parts, -1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``; for more than `FEW_ROWS` rows in the dtype in which the device is fastest."""
    wide = arithmetic_dtype(x.dtype, x.device.type)
    if wide == x.dtype or x.numel() <= FEW_ROWS * x.shape[-1]:
        return functional.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(wide)
    return functional.linear(x.to(wide), weight.to(wide), wide_bias).to(x.dtype)


def rows_at_once(columns: int, device: str) -> int:
    """Return the rows that are multiplied at once: so many that a block begins where memory is aligned."""
    return max(1, BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS_ELSEWHERE) // (32 * columns)) * 32


def group_sums(x: Tensor, groups: int) -> Tensor:
    """Return the sums of x (n, columns) over each group of columns, (n, groups)."""
    return x.view(x.shape[0], groups, -1).sum(-1)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors, or their absence, are the same in dtype and every value."""
    return (a is None) == (b is None) and (a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b)))
