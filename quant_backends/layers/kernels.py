"""Ways of multiplying with a packed weight, each with the layout of codes that it reads.

A layer holds its codes in one layout only. `kernel_choice.fastest` exchanges the canonical one for that of the best
kernel there is; every layout gives the canonical codes back exactly, so that a layer can be moved, saved and looked
into afterwards.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.packing import pack, plane_bytes, plane_widths, unpack

BLOCK_ELEMENTS = {"cpu": 1 << 20}
"""Of a weight that is dequantized at a time, by type of device."""
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 26


class Shape(NamedTuple):
    """What decides which kernel can take a weight.

    Attributes:
        bits: Bits per code.
        rows: Of the weight.
        columns: Padding included.
        group_size: Columns that share a scale.
        dtype: Of scales and activations.
        device: Type of the device, ``cpu`` or ``cuda``.
    """

    bits: int
    rows: int
    columns: int
    group_size: int
    dtype: torch.dtype
    device: str


class Kernel(nn.Module, ABC):
    """A quantized weight in the layout that one kernel reads; all tensors are buffers.

    Attributes:
        name: Of the kernel, as reports show it.
        scales: Name of the buffer that holds the scales.
        bits: Bits per code.
        rows: Of the weight.
        columns: Padding included.
        group_size: Columns that share a scale.
    """

    name: ClassVar[str]
    scales: ClassVar[str] = "scale"
    bits: int
    rows: int
    columns: int
    group_size: int

    @classmethod
    @abstractmethod
    def takes(cls, shape: Shape) -> bool:
        """Return whether this kernel is there and does such weights."""

    @classmethod
    @abstractmethod
    def from_codes(cls, codes: Codes, bits: int) -> Kernel:
        """Bring a weight into this kernel's layout."""

    @abstractmethod
    def codes(self, start: int, stop: int) -> Codes:
        """Return some rows in the canonical form, exactly as they were given."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``.

        Args:
            x: (n, columns), in any floating dtype.
        """

    @property
    def groups(self) -> int:
        """Groups per row."""
        return self.columns // self.group_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales: what the layer computes in."""
        return self.get_buffer(self.scales).dtype

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.get_buffer(self.scales).device

    @property
    def shape(self) -> Shape:
        """What decides which other kernel could take this weight."""
        return Shape(self.bits, self.rows, self.columns, self.group_size, self.dtype, self.device.type)

    def canonical(self) -> Dequantize:
        """Return the weight in the canonical layout."""
        return Dequantize.from_codes(self.codes(0, self.rows), self.bits)

    def dequantized_matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` through dense rows, a block of them at a time.

        Where the processor has no 16-bit arithmetic the product is computed in float32, several times faster than
        torch's own 16-bit product of dense weights there.
        """
        dtype = arithmetic_dtype(x.dtype, x.device.type)
        wide = x.to(dtype)
        step = max(1, BLOCK_ELEMENTS.get(x.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // self.columns)
        parts = [
            _multiply(wide, self.codes(start, min(start + step, self.rows)), self.bits)
            for start in range(0, self.rows, step)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(x.dtype)

    def _describe(self, bits: int, codes: Codes) -> None:
        self.bits = bits
        self.rows, groups, self.group_size = codes.codes.shape
        self.columns = groups * self.group_size

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Files hold the canonical layout: a kernel's own one depends on the machine.
        self.canonical()._save_to_state_dict(destination, prefix, keep_vars)


class Dequantize(Kernel):
    """The canonical layout, bit planes of exactly N bits a weight, multiplied through dense rows.

    Args:
        bits: Bits per code.
        rows: Of the weight.
        columns: Padding included.
        group_size: Columns that share a scale.
        symmetric: Without zero points.
        float_zero_point: Zero points are real numbers in `dtype` instead of uint8.
        dtype: Of the scales.
        device: Where the buffers live.
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
        """Return True: it does everything."""
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
        codes = unpack(planes, self.bits, self.columns).view(-1, self.groups, self.group_size)
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
    """Return the dtype of unquantized weights and of the arithmetic where none is asked for."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@functools.cache
def arithmetic_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype in which a product of dense weights is quickest: float32 where 16 bits are emulated."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if native[dtype]() else torch.float32


def _multiply(x: Tensor, codes: Codes, bits: int) -> Tensor:
    """Return x (n, columns) times dequantized rows, (n, rows), in the dtype of `x`."""
    if x.element_size() < 4:
        return x @ codes.dequantize(bits, x.dtype).T
    # Σ(c − z)·s·x = Σ(c − m)·s·x + (m − z)·s·Σx group by group, m in the middle: the zero points take no pass over the
    # weight, and what they add is small, so that float32 loses nothing by it. The subtraction wraps around in a byte.
    middle = 1 << (bits - 1)
    weight = (codes.codes - middle).view(torch.int8).to(x.dtype)
    scale = codes.scale.to(x.dtype)
    weight *= scale.unsqueeze(-1)
    y = functional.linear(x, weight.flatten(1))
    if codes.zero_point is not None:
        offset = scale * (middle - codes.zero_point.to(x.dtype))
        y.addmm_(group_sums(x, weight.shape[1]), offset.T)
    return y


def group_sums(x: Tensor, groups: int) -> Tensor:
    """Return the sums of x (n, columns) over each group of columns, (n, groups)."""
    return x.view(x.shape[0], groups, -1).sum(-1)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors, or their absence, are the same in dtype and every value."""
    return (a is None) == (b is None) and (a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b)))
