"""Kernel of the library gemlite (Triton), for GPUs."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.kernels import Dequantize, Shape
from lmms_plugin.quant_backends.layers.packing import plane_widths

BITS = (8, 4, 2)
"""Numbers of bits that the library packs, of those that are quantized to here."""

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "FP16"}


@functools.cache
def is_installed() -> bool:
    """Return whether the library is there; it can be imported only where there is a GPU."""
    return importlib.util.find_spec("gemlite") is not None


class Gemlite(Dequantize):
    """``GemLiteLinear``: 8, 4 or 2 bits, bfloat16 or float16, groups that are a power of two, or whole rows.

    The library's layout gives no codes back, so that planes of them lie in host memory beside it. Products of few rows
    are split along the columns and added in the order in which parts are ready: their last bits differ from call to
    call.
    """

    name = "gemlite"
    reproducible = False

    @classmethod
    def takes(cls, shape: Shape) -> bool:
        """Return whether the library is there and sizes fit."""
        group = shape.group_size
        return (
            shape.device == "cuda"
            and shape.dtype in _DTYPES
            and shape.bits in BITS
            and shape.columns % 32 == 0
            and shape.rows % 32 == 0
            and group >= 16
            and (group & (group - 1) == 0 or group == shape.columns)
            and is_installed()
        )

    @classmethod
    def from_codes(cls, codes: Codes, bits: int) -> Gemlite:
        """Pack a weight by the library."""
        # Imported late: the library asks for the GPU when it is imported.
        from gemlite import DType, GemLiteLinear

        made = super().from_codes(codes, bits)
        assert isinstance(made, Gemlite)
        dtype = DType[_DTYPES[made.dtype]]
        middle = torch.full_like(made.scale, float(1 << (bits - 1)))
        zeros = middle if made.zero_point is None else made.zero_point.to(made.dtype)
        layer = GemLiteLinear(bits, made.group_size, made.columns, made.rows, input_dtype=dtype, output_dtype=dtype)
        layer.pack(codes.codes.flatten(1).contiguous(), made.scale, zeros, bias=None, fma_mode=False)
        # Not as a submodule: what is counted and saved are the planes.
        object.__setattr__(made, "_layer", layer)
        for width in plane_widths(bits):
            setattr(made, f"plane_{width}", made.get_buffer(f"plane_{width}").cpu())
        return made

    @property
    def extra_bytes(self) -> int:
        """Return the bytes of the library's own tensors, on the device."""
        layer: Any = self._layer
        return sum(tensor.numel() * tensor.element_size() for tensor in (*layer.parameters(), *layer.buffers()))

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` by the library."""
        if not self.takes_rows(len(x), x.dtype):
            return self.dequantized_matmul(x)
        layer: Any = self._layer
        product: Tensor = layer(self.padded(x).contiguous())
        return product

    def canonical(self) -> Dequantize:
        """Return the weight in the canonical layout."""
        return Dequantize.from_codes(self.codes(0, self.rows), self.bits)
