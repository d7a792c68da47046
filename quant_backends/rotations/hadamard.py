"""Randomised Hadamard rotations of any size, and their use on a layer's inputs at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrix Q = D (H ⊗ B) of random signs D, a Hadamard matrix H and a small random orthogonal block B.

    H has the order of the largest power of two that divides the size; B has that of the odd rest, and is drawn from
    the uniform distribution over orthogonal matrices. So all sizes have a rotation, without tables of Hadamard matrices
    of other orders. A size that is a power of two has no block (QuaRot's own rotation, arXiv:2404.00456).

    Attributes:
        size: Number of rows and columns.
        seed: Seed of signs and block.
    """

    size: int
    seed: int

    @property
    def block(self) -> int:
        """Return the order of the random orthogonal block: the odd part of the size."""
        return self.size // (self.size & -self.size)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x Q for x (..., size), in the dtype of `x`."""
        signs, block = _parts(self.size, self.seed, x.dtype, x.device)
        y = (x * signs).reshape(-1, self.size // self.block, self.block)
        if block is not None:
            y = y @ block
        rotated: Tensor = walsh_hadamard(y) / y.shape[1] ** 0.5
        return rotated.reshape(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """Return x Qᵀ for x (..., size), in the dtype of `x`."""
        signs, block = _parts(self.size, self.seed, x.dtype, x.device)
        y = x.reshape(-1, self.size // self.block, self.block)
        y = walsh_hadamard(y) / y.shape[1] ** 0.5
        if block is not None:
            y = y @ block.T
        turned: Tensor = y.reshape(x.shape) * signs
        return turned


@dataclass(frozen=True)
class MeanKeepingRotation:
    """Orthogonal matrix Q = P S Pᵀ that keeps the vector of ones, and so the mean and the deviation of every row.

    P = H ⊗ B / √order is orthogonal with a constant first column: H is a Hadamard matrix, B the discrete cosine
    transform of the odd part of the size, whose entries differ little in size. S holds random signs, +1 first. An entry
    of Q is a sum of `size` terms of random sign, so that a single large channel is spread over all of them.

    Attributes:
        size: Number of rows and columns.
        seed: Seed of the signs.
    """

    size: int
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """Return x Q for x (..., size), in the dtype of `x`; Q is its own inverse."""
        signs, block = _mean_keeping_parts(self.size, self.seed, x.dtype, x.device)
        order = self.size // len(block)
        y = walsh_hadamard(x.reshape(-1, order, len(block)) @ block) * signs.view(order, -1)
        turned: Tensor = walsh_hadamard(y) @ block.T / order
        return turned.reshape(x.shape)


@cache
def _mean_keeping_parts(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return signs (size,) and block (odd part, odd part)."""
    draw = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        signs = torch.randint(0, 2, (size,), generator=draw, dtype=torch.float64) * 2 - 1
        signs[0] = 1
        odd = Rotation(size, 0).block
        places = torch.arange(odd, dtype=torch.float64)
        block = torch.cos(torch.pi / odd * (places + 0.5).unsqueeze(1) * places) * (2 / odd) ** 0.5
        block[:, 0] = odd**-0.5
        return signs.to(device, dtype), block.to(device, dtype)


@cache
def _parts(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return signs (size,) and block (odd part, odd part); no block of order 1."""
    draw = torch.Generator().manual_seed(seed)
    # Kept for later calls, which may need gradients.
    with torch.inference_mode(False):
        return _drawn(size, draw, dtype, device)


def _drawn(size: int, draw: torch.Generator, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    signs = torch.randint(0, 2, (size,), generator=draw, dtype=torch.float64) * 2 - 1
    order = Rotation(size, 0).block
    block = None if order == 1 else _orthogonal(order, draw).to(device, dtype)
    return signs.to(device, dtype), block


def _orthogonal(order: int, draw: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(order, order, generator=draw, dtype=torch.float64))
    # Signs that make the decomposition unique, so that all orthogonal matrices are equally likely.
    unique: Tensor = q * r.diagonal().sign()
    return unique


def walsh_hadamard(x: Tensor) -> Tensor:
    """Return H x along the second dimension of x (rows, order, columns), with entries ±1 of H in Sylvester's order."""
    rows, order, columns = x.shape
    half = 1
    while half < order:
        pairs = x.reshape(rows, order // (2 * half), 2, half, columns)
        first, second = pairs.unbind(2)
        x = torch.stack((first + second, first - second), 2)
        half *= 2
    return x.reshape(rows, order, columns)


def rotate_inputs(layer: nn.Module, rotation: Rotation) -> None:
    """Let a linear layer, whose weight is rotated already, rotate its inputs at run time, in float32."""

    def rotated(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (rotation(x.float()).to(x.dtype), *args[1:])

    layer.input_rotation = rotation  # type: ignore[assignment]
    # Before hooks that observe inputs: these see what the layer multiplies.
    layer.register_forward_pre_hook(rotated, prepend=True)


def input_rotation(layer: nn.Module) -> Rotation | None:
    """Return the rotation of a layer's inputs; None for none."""
    return getattr(layer, "input_rotation", None)
