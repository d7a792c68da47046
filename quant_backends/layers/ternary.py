"""Ternary linear layers: weights are sums of two trits (-1, 0, 1), packed five trits to a byte.

That is 1.6 bits per trit, where log2(3) = 1.585 is the least possible.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import columns_per_group, split_groups
from lmms_plugin.quant_backends.layers.dense_products import DenseProducts
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantSpec

TRITS_PER_BYTE = 5
"""3**5 = 243 values of 256."""


def trit_bytes(count: int) -> int:
    """Return the number of bytes of `count` packed trits."""
    return -(-count // TRITS_PER_BYTE)


def pack_trits(trits: Tensor) -> Tensor:
    """Pack each row of a matrix of trits separately.

    Byte j of a row holds trits j, j + n, j + 2n, … with n bytes in a row, so that unpacking writes a few long
    contiguous runs. The base-3 number of its trits is stored as a fixed-point fraction of 243, rounded up, whose digits
    are extracted from the top by multiplying instead of dividing.

    Args:
        trits: (rows, columns), integers in {-1, 0, 1}.

    Returns:
        (rows, trit_bytes(columns)) uint8.
    """
    rows, columns = trits.shape
    length = trit_bytes(columns)
    digits = torch.ones(rows, TRITS_PER_BYTE * length, dtype=torch.int32, device=trits.device)
    digits[:, :columns] += trits
    number = torch.zeros(rows, length, dtype=torch.int32, device=trits.device)
    for digit in digits.view(rows, TRITS_PER_BYTE, length).unbind(1):
        number = number * 3 + digit
    return ((number * 256 + 242) // 243).to(torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Undo `pack_trits`: return the (rows, columns) int8 trits of (rows, bytes)."""
    rows, length = packed.shape
    trits = torch.empty(rows, TRITS_PER_BYTE, length, dtype=torch.int8, device=packed.device)
    rest = packed.to(torch.int16)
    for position in range(TRITS_PER_BYTE):
        rest *= 3
        trits[:, position] = rest >> 8
        rest &= 255
    trits -= 1
    return trits.view(rows, -1)[:, :columns]


class TritPlanes(NamedTuple):
    """Weight as ``planes[0] * scale[..., 0] + planes[1] * scale[..., 1]``, scales repeated along their groups.

    Attributes:
        planes: (2, rows, columns) int8 in {-1, 0, 1}.
        scale: (rows, groups, 2), not negative, the larger one first, in the dtype the layer computes in.
    """

    planes: Tensor
    scale: Tensor

    def dequantize(self, group_size: int | None, dtype: torch.dtype) -> Tensor:
        """Return the weight, (rows, columns), computed in `dtype`."""
        first, second = (split_groups(plane.to(dtype), group_size) for plane in self.planes)
        scale = self.scale.to(dtype)
        # The products are exact, so that only the sum is rounded.
        weight = first.mul_(scale[..., :1]).addcmul_(second, scale[..., 1:])
        return weight.flatten(1)[:, : self.planes.shape[2]]


class TritPlaneLinear(DenseProducts, QuantizedLinear):
    """Linear layer whose weight is two planes of trits, five trits to a byte, and two scales per group.

    The weight takes 3.2 bits and the scales 32 / group_size more, 3.45 at a group of 128 in a 16-bit dtype. `bits` is
    3, the nearest whole number: a weight has one of nine values (two trits hold 3.17 bits; 1.58 is one plane alone).
    Padding columns are not stored.

    Args:
        in_features: Number of columns of the weight.
        out_features: Number of rows of the weight.
        spec: Spec, of which only the group size counts; bits and symmetry are fixed.
        bias: Whether there is a bias.
        dtype: Dtype of scales and bias, in which the layer computes.
        device: Device of the buffers.
    """

    bits = 3
    coded = ("planes",)

    planes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.group_size = columns_per_group(spec.group_size, in_features)
        groups = -(-in_features // self.group_size)
        shape = (2, out_features, trit_bytes(in_features))
        self.register_buffer("planes", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(out_features, groups, 2, dtype=dtype, device=device))
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_planes(cls, quantized: TritPlanes, spec: QuantSpec, bias: nn.Parameter | None = None) -> TritPlaneLinear:
        """Pack a quantized weight; the bias is kept unchanged."""
        _, rows, columns = quantized.planes.shape
        layer = cls(columns, rows, spec, dtype=quantized.scale.dtype, device="meta")
        layer.planes = torch.stack([pack_trits(plane) for plane in quantized.planes])
        layer.scale = quantized.scale.detach().contiguous()
        layer.bias = bias
        return layer

    @property
    def padded_columns(self) -> int:
        """Return 0: the last group of a row may be shorter than the others."""
        return 0

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of both planes and all scales."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, (stop - start, in_features), computed at each call."""
        return self._dense(start, stop, self.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        return self.product(x, self.bias)

    @property
    def kernel(self) -> str:
        """Return what the forward pass runs on."""
        return self.multiplied()

    @property
    def device(self) -> torch.device:
        """Return the device where the layer computes."""
        return self.scale.device

    @property
    def operand_dtype(self) -> torch.dtype:
        """Return the dtype in which products read the weight."""
        return self.scale.dtype

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight as products read them."""
        return self._dense(start, stop, dtype).contiguous()

    def _dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        # Planes may lie in host memory, where dense weights are kept on the device.
        planes = torch.stack([unpack_trits(plane[start:stop], self.in_features) for plane in self.planes])
        planes = planes.to(self.device)
        return TritPlanes(planes, self.scale[start:stop]).dequantize(self.group_size, dtype)
