"""torchao: int8 and int4 weights in the library's own tensors and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import DataFreeBackend
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.quant_backends.layers.codes import columns_per_group
from lmms_plugin.quant_backends.layers.library import TensorLinear, pad_columns
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec

SOLVERS = ("tinygemm", "hqq")
INT4_GROUPS = (32, 64, 128)
UNITS = 1024
"""Columns of a weight that are read back from a kernel at once."""


@dataclass(frozen=True)
class TorchaoBackend(DataFreeBackend):
    """torchao (PyTorch), weights only: the int8 and int4 kernels that it has for the device at hand.

    8 bits are symmetric in groups or whole rows. 4 bits have a real-valued zero per group and run on torch's own int4
    matrix product (fast in bfloat16; on CUDA bfloat16 is required). The library stores fewer bits in whole bytes, which
    saves nothing, so they are refused. It leaves layers dense whose width a group size does not divide; here they are
    padded.

    Attributes:
        solver: Solver of 4-bit scales and zeros: ``tinygemm`` (minimum and maximum) or ``hqq``.
    """

    name = "torchao"
    bits = frozenset({4, 8})
    unsaved = "torchao keeps weights in a form of its own"
    undense = "torchao multiplies by tensors of its own"

    solver: str = "tinygemm"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")

    def check(self, plan: QuantPlan) -> None:
        """Refuse a plan that the library cannot carry out, or a missing library."""
        super().check(plan)
        require("torchao.quantization", extra="torchao", user="quant_torchao")

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse what the kernels do not support."""
        if spec.bits < 8 and spec.bits not in self.bits:
            raise ValueError(
                f"torchao keeps {spec.bits}-bit weights in whole bytes, which saves nothing over 8 bits; it can: 4, 8"
            )
        super().check_spec(spec)
        if spec.bits == 4 and spec.group_size not in INT4_GROUPS:
            raise ValueError(f"torchao's int4 kernels take groups of {_listed(INT4_GROUPS)}, got {spec.group_size}")
        if spec.bits == 4 and spec.symmetric:
            raise ValueError("torchao's 4-bit weights have a zero point per group; leave symmetric=False")

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer as ``torchao.quantization.quantize_`` does.

        Raises:
            ValueError: The kernel for this device supports no layer of this shape or dtype.
        """
        from torchao.quantization import quantize_

        rows, width = weight.shape
        # The int4 kernels have a few group sizes, to which narrow layers are padded.
        group_size = spec.group_size if spec.bits == 4 else columns_per_group(spec.group_size, width)
        assert group_size is not None
        # The library takes a layer, but reads only its weight.
        linear = nn.Linear(1, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(pad_columns(weight, group_size), requires_grad=False)
        config = self._int4(weight, group_size) if spec.bits == 4 else _int8(group_size, linear.weight.shape[1])
        quantize_(linear, config, filter_fn=None)
        quantized = linear.weight.data
        if type(quantized) is Tensor:
            raise ValueError(f"torchao left a layer of {rows} x {width} dense in groups of {group_size}; skip it")
        layer = Int4Linear if spec.bits == 4 else TensorLinear
        return layer(quantized, width, bias=bias, bits=spec.bits, group_size=group_size, library="torchao")

    def _int4(self, weight: Tensor, group_size: int) -> Any:
        if weight.device.type == "cpu":
            int4 = require("torchao.prototype.quantization.int4", extra="torchao", user="quant_torchao on the CPU")
            if weight.shape[0] % 16:
                raise ValueError(
                    f"torch's int4 kernel for the CPU takes rows in multiples of 16, got a layer of {weight.shape[0]}; "
                    "skip it in the plan or give it 8 bits"
                )
            return int4.PrototypeInt4WeightOnlyConfig(
                group_size=group_size, int4_choose_qparams_algorithm=self.solver, set_inductor_config=False
            )
        from torchao.quantization import Int4WeightOnlyConfig

        if weight.dtype is not torch.bfloat16:
            raise ValueError(f"torch's int4 kernel for {weight.device.type} computes in bfloat16, got {weight.dtype}")
        return Int4WeightOnlyConfig(
            group_size=group_size,
            int4_packing_format="tile_packed_to_4d",
            int4_choose_qparams_algorithm=self.solver,
            set_inductor_config=False,
        )


class Int4Linear(TensorLinear):
    """Linear layer over a torchao int4 tensor, which can multiply but not dequantize."""

    def dequantize(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), as the kernel's products with unit vectors."""
        stored = self.stored
        padded = self.in_features + self.padded_columns
        columns = []
        for start in range(0, self.in_features, UNITS):
            stop = min(start + UNITS, self.in_features)
            units = torch.zeros(stop - start, padded, dtype=stored.dtype, device=stored.device)
            units[:, start:stop].fill_diagonal_(1)
            columns.append(functional.linear(units, stored))
        return torch.cat(columns).T


def _int8(group_size: int, width: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

    granularity = PerRow() if group_size == width else PerGroup(group_size)
    return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
