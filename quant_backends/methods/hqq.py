"""HQQ, half-quadratic quantization: solved by the hqq library, stored in the packed linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_plugin.quant_backends.backend import CodesBackend
from lmms_plugin.quant_backends.layers.codes import Codes, split_groups
from lmms_plugin.quant_backends.plans.plan import QuantSpec


@dataclass(frozen=True)
class HqqBackend(CodesBackend):
    """HQQ (Badri & Shaji, 2023): zero points fitted under a sparsity-promoting norm of the error.

    Equal to the library's own ``HQQLinear`` with ``axis=1``, bit for bit in the same compute dtype. Where the group
    size does not divide the width, the library lets groups run across rows; here rows are padded with zeros instead.

    Attributes:
        round_zero: Whether to start from integer zero points, as round-to-nearest has them, so that weights near zero
            stay near it. The library does so at 4 bits alone.
    """

    round_zero: bool = True

    name = "hqq"
    bits = frozenset({2, 3, 4, 5, 6, 8})

    @property
    def uncompressed(self) -> str | None:
        """Return the reason: the library's zero points need this package's own format."""
        return "its zero points are no integers"

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse symmetric grids and unsupported bits: the zero point is what HQQ optimises."""
        super().check_spec(spec)
        if spec.symmetric:
            raise ValueError("hqq fits a zero point to each group and cannot be symmetric; leave symmetric=False")

    def quantize(self, weight: Tensor, spec: QuantSpec) -> Codes:
        """Quantize a weight (rows, columns) with the library's default solver."""
        # Imported here: the library takes seconds to load and only this backend uses it.
        from hqq.core.quantize import Quantizer

        groups = split_groups(weight.float(), spec.group_size)
        codes, meta = Quantizer.quantize(
            groups.flatten(1),
            nbits=spec.bits,
            channel_wise=True,
            group_size=groups.shape[-1],
            optimize=True,
            round_zero=self.round_zero,
            axis=1,
            bitpack=False,
            device=str(weight.device),
        )
        shape = groups.shape[:2]
        return Codes(
            codes.to(torch.uint8).view(groups.shape),
            meta["scale"].to(weight.dtype).view(shape),
            meta["zero"].to(weight.dtype).view(shape),
        )
