"""Codes of 1 to 8 bits in uint8 bytes, with nothing wasted: N bits take exactly N bits.

A code is cut into planes whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1). Within a plane, byte j holds codes j, j + n, j + 2n, …, so that unpacking writes a few
long contiguous runs instead of gathering neighbours out of every byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes that hold `bits`-bit codes, widest first.

    >>> plane_widths(7)
    (4, 2, 1)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of 1 to 8 bits can be packed, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_bytes(count: int, width: int) -> int:
    """Return the length in bytes of one plane of `count` codes."""
    return -(-count * width // 8)


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Pack codes into bit planes.

    Args:
        codes: uint8 values in [0, 2**bits), any shape.
        bits: Bits per code, 1 to 8.

    Returns:
        One flat uint8 tensor per plane, in the order of `plane_widths`; codes are taken in row-major order.
    """
    flat = codes.reshape(-1)
    planes = []
    offset = bits
    for width in plane_widths(bits):
        offset -= width
        per_byte = 8 // width
        length = plane_bytes(flat.numel(), width)
        part = flat.new_zeros(per_byte * length)
        part[: flat.numel()] = (flat >> offset) & ((1 << width) - 1)
        plane = flat.new_zeros(length)
        for position, run in enumerate(part.view(per_byte, length)):
            plane |= run << (width * position)
        planes.append(plane)
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int, count: int) -> Tensor:
    """Return the `count` codes that `pack` put into `planes`, flat, uint8."""
    codes = torch.zeros(count, dtype=torch.uint8, device=planes[0].device)
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        mask = (1 << width) - 1
        codes <<= width if width < 8 else 0
        for position in range(8 // width):
            run = codes[position * plane.numel() : (position + 1) * plane.numel()]
            run |= (plane[: run.numel()] >> (width * position)) & mask
    return codes
