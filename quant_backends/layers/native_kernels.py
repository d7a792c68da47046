"""Kernels over torch's own int4 and int8 matrix products, for bfloat16."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.kernels import Kernel, Shape, group_sums, same
from lmms_plugin.quant_backends.layers.packing import plane_widths

INT4_GROUPS = (256, 128, 64, 32)
"""Group sizes of the int4 kernels; a multiple of one is done as several groups of the same scale."""


def kernel_group(group_size: int) -> int | None:
    """Return the largest group size of the int4 kernels that divides `group_size`; None if there is none."""
    return next((size for size in INT4_GROUPS if group_size % size == 0), None)


class Int4Kernel(Kernel):
    """Base of the int4 kernels of CPU and GPU: scale and zero in one tensor, ``w = (q - 8) * scale + zero``.

    Up to 4 bits a weight is one number q. More bits are two, ``16·high + low`` or the like, and two products are added.
    Numbers of fewer than 4 bits are shifted to lie around 8, so that zeros are small: they are rounded to bfloat16, an
    error of at most 1/64 of a step, and with two numbers the second zero compensates the rounding of the first. Zero
    points are recovered from them where that is exact, and stored beside them where it is not.
    """

    scales = "scale_and_zero"
    scale_and_zero: Tensor
    zero_point: Tensor | None

    @property
    def _shifts(self) -> tuple[int, ...]:
        """Return the power of two of each number of a weight, highest first."""
        low = self.bits & 3
        return (0,) if self.bits <= 4 else (low, 0)

    def _set_scale_and_zero(self, codes: Codes) -> None:
        """Fill `scale_and_zero`, (numbers, columns / kernel group, rows, 2) bfloat16, and `zero_point`."""
        size = kernel_group(self.group_size)
        assert size is not None
        scale = codes.scale.T.float()
        middle = float(1 << (self.bits - 1))
        zero = torch.full_like(scale, middle) if codes.zero_point is None else codes.zero_point.T.float()
        rest = scale * (self._middle - zero)
        pairs = []
        for shift in self._shifts:
            rounded = rest.bfloat16()
            rest = rest - rounded.float()
            pairs.append(torch.stack([(scale * (1 << shift)).bfloat16(), rounded], -1))
        self.symmetric = codes.zero_point is None
        packed = torch.stack(pairs).repeat_interleave(self.group_size // size, 1)
        self.register_buffer("scale_and_zero", packed.contiguous())
        self.register_buffer("zero_point", None)
        if codes.zero_point is not None and not same(codes.zero_point, self._zeros(0, self.rows)):
            self.zero_point = codes.zero_point.clone()

    @property
    def _middle(self) -> float:
        """Return the code for which each number of a weight is 8."""
        return 8.0 * sum(1 << shift for shift in self._shifts) - _lift(self.bits & 3)

    def _scales(self, start: int, stop: int) -> Tensor:
        repeated = self.scale_and_zero.shape[1] // self.groups
        return self.scale_and_zero[-1, ::repeated, start:stop, 0].T.contiguous()

    def _zeros(self, start: int, stop: int) -> Tensor | None:
        if self.symmetric:
            return None
        if self.zero_point is not None:
            return self.zero_point[start:stop]
        repeated = self.scale_and_zero.shape[1] // self.groups
        offset = self.scale_and_zero[:, ::repeated, start:stop, 1].float().sum(0).T
        return (self._middle - offset / self._scales(start, stop).float()).round().clamp(0, 255).to(torch.uint8)


class CpuInt4(Int4Kernel):
    """``aten::_weight_int4pack_mm_for_cpu``: 2 to 7 bits, bfloat16.

    The kernel reads two 4-bit numbers per byte, in tiles of rows whose height depends on the processor. Planes of 2 and
    1 bits are stored as two and four such tiles in the bits of one, so that codes still take exactly N bits per weight;
    masks and shifts convert them to the kernel's form at each call.
    """

    name = "torch CPU int4"

    @classmethod
    def takes(cls, shape: Shape) -> bool:
        """Return whether sizes fit: rows in multiples of 16, group sizes of a multiple of 32."""
        return (
            shape.device == "cpu"
            and shape.dtype == torch.bfloat16
            and 2 <= shape.bits <= 7
            and shape.rows % 16 == 0
            and kernel_group(shape.group_size) is not None
            and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
            and tile_height() is not None
        )

    @classmethod
    def from_codes(cls, codes: Codes, bits: int) -> CpuInt4:
        """Convert a weight to tiles."""
        made = cls()
        made._describe(bits, codes)
        values = codes.codes.flatten(1)
        # The widest plane holds the highest bits above 4 bits, as everywhere; below, the lowest, which saves a shift.
        offset = 0 if bits < 4 else bits & 3
        for width in plane_widths(bits):
            tiles = to_tiles(values, offset, width)
            made.register_buffer(f"tiles_{width}", _squeeze(tiles, width))
            offset = 0 if width == 4 else width
        made._set_scale_and_zero(codes)
        return made

    def _numbers(self) -> list[Tensor]:
        """Return the numbers of the weight in the kernel's form, flat bytes, highest first."""
        high = [self.get_buffer("tiles_4")] if self.bits & 4 else []
        return high + ([self._low()] if self.bits & 3 else [])

    def _low(self) -> Tensor:
        low = self.bits & 3
        made = _spread(self.get_buffer("tiles_2" if low & 2 else "tiles_1"), min(low, 2))
        if low == 3:
            _add_third_bit(made, self.get_buffer("tiles_1"))
        made += 0x11 * _lift(low)
        return made

    def codes(self, start: int, stop: int) -> Codes:
        """Return some rows in the canonical form."""
        height = tile_height()
        assert height is not None
        first, last = start - start % height, min(self.rows, stop + -stop % height)
        per_row = self.columns // 2
        parts = [from_tiles(tiles[first * per_row : last * per_row], self.columns) for tiles in self._numbers()]
        values = parts[-1].sub_(lift) if (lift := _lift(self.bits & 3)) else parts[-1]
        if len(parts) == 2:
            values |= parts[0].bitwise_left_shift_(self._shifts[0])
        kept = values[start - first : stop - first].view(-1, self.groups, self.group_size)
        return Codes(kept, self._scales(start, stop), self._zeros(start, stop))

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, by the kernel for few rows of bfloat16."""
        if not self.takes_rows(len(x), x.dtype):
            return self.dequantized_matmul(x)
        group, x = self.columns // self.scale_and_zero.shape[1], self.padded(x).contiguous()
        products: list[Tensor] = [
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiles.view(self.rows, -1), group, pair)
            for tiles, pair in zip(self._numbers(), self.scale_and_zero, strict=True)
        ]
        return products[0] if len(products) == 1 else products[0] + products[1]


def _lift(bits: int) -> int:
    """Return the offset that centres the range of a number of 1 to 3 bits around 8; 0 for one of 4 bits."""
    return 8 - (1 << (bits - 1)) if bits else 0


def to_tiles(values: Tensor, offset: int = 0, width: int = 4) -> Tensor:
    """Return `width` bits of values (rows, columns), from bit `offset` on, as the CPU kernel's bytes, flat."""
    # The operator takes int32; few rows at a time limit its memory. Tiles are at most 64 rows high.
    step = max(64, (1 << 22) // values.shape[1] // 64 * 64)
    parts = []
    for block in values.split(step):
        numbers = (block >> offset) & ((1 << width) - 1)
        parts.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1).flatten())
    return torch.cat(parts)


def from_tiles(tiles: Tensor, columns: int) -> Tensor:
    """Undo `to_tiles`: return the values (rows, columns) uint8."""
    height = tile_height()
    assert height is not None
    return _untile(tiles, columns, height)


def _untile(tiles: Tensor, columns: int, height: int) -> Tensor:
    """Undo tiling: whole tiles hold rows i and i + height / 2 in a byte; the remaining rows are stored in pairs."""
    rows = 2 * tiles.numel() // columns
    whole = rows - rows % height
    values = tiles.new_empty(rows, columns)
    top = tiles[: whole * columns // 2].view(-1, columns, height // 2)
    by_tile = values[:whole].view(-1, 2, height // 2, columns)
    by_tile[:, 0] = (top & 15).transpose(1, 2)
    by_tile[:, 1] = (top >> 4).transpose(1, 2)
    rest = tiles[whole * columns // 2 :].view(columns, -1)
    values[whole::2] = (rest & 15).T
    values[whole + 1 :: 2] = (rest >> 4).T
    return values


@functools.cache
def tile_height() -> int | None:
    """Return the rows per tile of the CPU kernel on this processor, found by trying; None for an unknown layout."""
    values = torch.randint(0, 16, (64 + 32 + 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiles = to_tiles(values)
    return next((height for height in (64, 32) if torch.equal(_untile(tiles, 32, height), values)), None)


def _squeeze(tiles: Tensor, width: int) -> Tensor:
    """Pack 4 / width tiles of `width`-bit values into the bits of one."""
    squeezed = torch.zeros_like(tiles[: tiles.numel() * width // 4])
    for position, part in enumerate(tiles.view(4 // width, -1)):
        squeezed |= part << (position * width)
    return squeezed


def _spread(squeezed: Tensor, width: int) -> Tensor:
    """Undo `_squeeze`."""
    mask = 0x33 if width == 2 else 0x11
    parts = squeezed.new_empty(4 // width, squeezed.numel())
    torch.bitwise_and(squeezed, mask, out=parts[0])
    for position, part in enumerate(parts[1:], 1):
        torch.bitwise_right_shift(squeezed, position * width, out=part)
        part &= mask
    return parts.view(-1)


def _add_third_bit(tiles: Tensor, squeezed: Tensor) -> None:
    """Set bit 2 of each value in `tiles` from the squeezed plane of single bits, in place."""
    moved = torch.empty_like(squeezed)
    for position, part in enumerate(tiles.view(4, -1)):
        if position < 2:
            torch.bitwise_left_shift(squeezed, 2 - position, out=moved)
        else:
            torch.bitwise_right_shift(squeezed, position - 2, out=moved)
        moved &= 0x44
        part |= moved


class CpuInt8(Kernel):
    """``aten::_weight_int8pack_mm``: 8 bits, bfloat16, one product per group, summed in float32."""

    name = "torch CPU int8"
    values: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def takes(cls, shape: Shape) -> bool:
        """Return whether sizes fit."""
        return (
            shape.device == "cpu"
            and shape.dtype == torch.bfloat16
            and shape.bits == 8
            and shape.group_size % 32 == 0
            and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        )

    @classmethod
    def from_codes(cls, codes: Codes, bits: int) -> CpuInt8:
        """Convert a weight to one int8 matrix per group."""
        made = cls()
        made._describe(bits, codes)
        values = codes.codes.transpose(0, 1).bitwise_xor(128).contiguous()
        made.register_buffer("values", values.view(torch.int8))
        made.register_buffer("scale", codes.scale.T.contiguous())
        made.register_buffer("zero_point", None if codes.zero_point is None else codes.zero_point.T.contiguous())
        return made

    def codes(self, start: int, stop: int) -> Codes:
        """Return some rows in the canonical form."""
        values = self.values[:, start:stop].view(torch.uint8).transpose(0, 1).bitwise_xor(128).contiguous()
        zero = None if self.zero_point is None else self.zero_point[:, start:stop].T.contiguous()
        return Codes(values, self.scale[:, start:stop].T.contiguous(), zero)

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, by the kernel for few rows of bfloat16."""
        if not self.takes_rows(len(x), x.dtype):
            return self.dequantized_matmul(x)
        x = self.padded(x)
        by_group = x.reshape(-1, self.groups, self.group_size).transpose(0, 1).contiguous()
        products = [
            torch.ops.aten._weight_int8pack_mm(*operands)
            for operands in zip(by_group, self.values, self.scale, strict=True)
        ]
        total = products[0].float() if len(products) == 1 else torch.stack(products).sum(0, dtype=torch.float32)
        if self.zero_point is not None:
            offset = self.scale.float() * (128 - self.zero_point.float())
            total.addmm_(group_sums(x.float(), self.groups), offset)
        return total.to(x.dtype)


class CudaInt4(Int4Kernel):
    """``aten::_weight_int4pack_mm`` (tinygemm): 4 bits, bfloat16, Ampere and later."""

    name = "torch CUDA int4"
    tiles: Tensor

    @classmethod
    def takes(cls, shape: Shape) -> bool:
        """Return whether rows are in multiples of 8, columns in multiples of 32, and the device is recent enough."""
        return (
            shape.device == "cuda"
            and shape.dtype == torch.bfloat16
            and shape.bits == 4
            and shape.rows % 8 == 0
            and kernel_group(shape.group_size) is not None
            and torch.cuda.get_device_capability() >= (8, 0)
        )

    @classmethod
    def from_codes(cls, codes: Codes, bits: int) -> CudaInt4:
        """Convert a weight to the tensor core's tiles."""
        made = cls()
        made._describe(bits, codes)
        values = codes.codes.flatten(1)
        inner = next(tiles for tiles in (8, 4, 2) if made.columns % (16 * tiles) == 0)
        pairs = (values[:, ::2] << 4) | values[:, 1::2]
        made.register_buffer("tiles", torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), inner))
        made._set_scale_and_zero(codes)
        return made

    def codes(self, start: int, stop: int) -> Codes:
        """Return some rows in the canonical form: codes times the identity, which is exact in bfloat16."""
        plain = self.scale_and_zero.new_empty(self.columns // 32, self.rows, 2)
        plain[..., 0], plain[..., 1] = 1, 8
        parts = []
        for block in torch.arange(self.columns, device=self.device).split(1024):
            one_hot = torch.zeros(len(block), self.columns, dtype=torch.bfloat16, device=self.device)
            one_hot[torch.arange(len(block), device=self.device), block] = 1
            product = torch.ops.aten._weight_int4pack_mm(one_hot, self.tiles, 32, plain)
            parts.append(product[:, start:stop].to(torch.uint8))
        values = torch.cat(parts).T.contiguous().view(-1, self.groups, self.group_size)
        return Codes(values, self._scales(start, stop), self._zeros(start, stop))

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, by the kernel for few rows of bfloat16."""
        if not self.takes_rows(len(x), x.dtype):
            return self.dequantized_matmul(x)
        group = self.columns // self.scale_and_zero.shape[1]
        product: Tensor = torch.ops.aten._weight_int4pack_mm(
            self.padded(x).contiguous(), self.tiles, group, self.scale_and_zero[0]
        )
        return product


NATIVE_KERNELS: tuple[type[Kernel], ...] = (CpuInt4, CpuInt8, CudaInt4)
