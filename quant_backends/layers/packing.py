"""Bit packing of 1- to 8-bit codes into uint8 bytes: N bits take exactly N bits.

A code is cut into bit planes whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). Within a
row of a plane of n bytes, byte j holds codes j, j + n, j + 2n, …, so that unpacking writes a few long contiguous runs
instead of gathering neighbours out of every byte, and rows can be unpacked one by one.

`pack_stream` is the order that most formats of files have: the codes of a row one after the other, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

STREAM_PART = 1 << 20
"""Codes that are packed into a stream at once: each of their bits takes a byte meanwhile."""


def plane_widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes that hold `bits`-bit codes, widest first.

    >>> plane_widths(7)
    (4, 2, 1)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of 1 to 8 bits can be packed, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_bytes(columns: int, width: int) -> int:
    """Return the number of bytes that one row of `columns` codes takes in a plane."""
    return -(-columns * width // 8)


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Pack codes into bit planes.

    Args:
        codes: (rows, columns) uint8 in [0, 2**bits).
        bits: Number of bits per code, 1 to 8.

    Returns:
        One uint8 tensor (rows, `plane_bytes`) per plane, in the order of `plane_widths`.
    """
    rows, columns = codes.shape
    planes = []
    offset = bits
    for width in plane_widths(bits):
        offset -= width
        part = (codes >> offset) & ((1 << width) - 1)
        length = plane_bytes(columns, width)
        plane = codes.new_zeros(rows, length)
        for position in range(8 // width):
            run = part[:, position * length : (position + 1) * length]
            plane[:, : run.shape[1]] |= run << (width * position)
        planes.append(plane)
    return tuple(planes)


def unpack(planes: Sequence[Tensor], bits: int, columns: int) -> Tensor:
    """Undo `pack`: return the codes, (rows, columns) uint8.

    Eight-bit codes are returned as a view, without a copy.
    """
    if bits == 8:
        return planes[0]
    widths = plane_widths(bits)
    codes = _unpack_plane(planes[0], widths[0], columns)
    for width, plane in zip(widths[1:], planes[1:], strict=True):
        codes <<= width
        codes |= _unpack_plane(plane, width, columns)
    return codes


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes into streams of bits, lowest bits first, with codes crossing the borders of bytes.

    Args:
        codes: (rows, columns) uint8 in [0, 2**bits).
        bits: Number of bits per code.

    Returns:
        (rows, ceil(columns · bits / 8)) uint8.
    """
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    rows = []
    for part in codes.split(max(1, STREAM_PART // codes.shape[1])):
        stream = ((part.unsqueeze(-1) >> places) & 1).flatten(1)
        stream = functional.pad(stream, (0, -stream.shape[1] % 8))
        rows.append((stream.view(len(part), -1, 8) * weights).sum(-1, dtype=torch.uint8))
    return torch.cat(rows)


def unpack_stream(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_stream`: return the codes, (rows, columns) uint8."""
    places = torch.arange(8, dtype=torch.uint8, device=stream.device)
    weights = (1 << torch.arange(bits, device=stream.device)).to(torch.uint8)
    rows = []
    for part in stream.split(max(1, STREAM_PART // columns)):
        single = ((part.unsqueeze(-1) >> places) & 1).flatten(1)[:, : columns * bits]
        rows.append((single.view(len(part), columns, bits) * weights).sum(-1, dtype=torch.uint8))
    return torch.cat(rows)


def _unpack_plane(plane: Tensor, width: int, columns: int) -> Tensor:
    rows, length = plane.shape
    values = plane.new_empty(rows, columns)
    mask = (1 << width) - 1
    last = 8 // width - 1
    for position in range(last + 1):
        run = values[:, position * length : (position + 1) * length]
        source = plane[:, : run.shape[1]]
        # Written in place: temporary arrays of this size cost more than the arithmetic on them.
        if position:
            torch.bitwise_right_shift(source, width * position, out=run)
        else:
            run.copy_(source)
        if position < last:
            run &= mask
    return values
