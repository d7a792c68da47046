"""optimum-quanto: int8, int4 and int2 weights in the library's own tensors and kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import DataFreeBackend
from lmms_plugin.quant_backends.layers.codes import columns_per_group
from lmms_plugin.quant_backends.layers.library import TensorLinear, pad_columns
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantSpec

INT8_COLUMNS = 16
"""torch's int8 matrix product for the CPU, which quanto calls in bfloat16, reads past the end of other widths: the
process dies with several rows of input (torch 2.15; Qwen2.5-VL's vision tower has a width of 3420)."""


@dataclass(frozen=True)
class QuantoBackend(DataFreeBackend):
    """optimum-quanto (Hugging Face; in maintenance mode), weights only.

    The grids are the library's: 8 bits are symmetric with one scale per row, whatever the group size, which the report
    shows; 4 and 2 bits have a real-valued zero per group. Where the library would widen a group to the whole row,
    because the group size does not divide the width, rows are padded with zeros instead.
    """

    name = "quanto"
    bits = frozenset({2, 4, 8})
    unsaved = "optimum-quanto keeps weights in a form of its own"
    undense = "optimum-quanto multiplies by tensors of its own"

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse symmetric grids below 8 bits, and unsupported bits."""
        super().check_spec(spec)
        if spec.symmetric and spec.bits < 8:
            raise ValueError(f"quanto's {spec.bits}-bit weights have a zero point per group; leave symmetric=False")

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer as ``optimum.quanto.quantize`` and ``freeze`` do."""
        # Imported here: the library takes seconds to load and only this backend uses it.
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

        width = weight.shape[1]
        if spec.bits == 8:
            weight = pad_columns(weight, INT8_COLUMNS)
            scale = AbsmaxOptimizer()(weight, qint8, axis=0)
            quantized = quantize_weight(weight, qint8, 0, scale)
            return TensorLinear(quantized, width, bias=bias, bits=8, group_size=width, library="quanto")
        group_size = columns_per_group(spec.group_size, width)
        weight = pad_columns(weight, group_size)
        group = None if group_size == weight.shape[1] else group_size
        qtype = qint4 if spec.bits == 4 else qint2
        expect_unpacking(weight.device.type)
        scale, shift = MaxOptimizer()(weight, qtype, axis=0, group_size=group)
        quantized = quantize_weight(weight, qtype, 0, scale, shift, group)
        return TensorLinear(quantized, width, bias=bias, bits=spec.bits, group_size=group_size, library="quanto")


@functools.cache
def expect_unpacking(device: str) -> None:
    """Build the library's C++ or CUDA extension, which it builds on first use.

    Raises:
        RuntimeError: There is no compiler, or nowhere to write the result.
    """
    try:
        torch.ops.quanto.unpack(torch.zeros(1, dtype=torch.uint8, device=device), 4)
    except (RuntimeError, OSError) as error:
        needs = "nvcc of the CUDA toolkit" if device == "cuda" else "a C++ compiler (g++)"
        raise RuntimeError(
            f"quanto builds its 4- and 2-bit kernels for {device} on first use, inside its own folder; that needs "
            f"{needs}, ninja and write access. bits=8 needs none of these, and neither does quant_rtn ({error})"
        ) from error
