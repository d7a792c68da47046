"""bitsandbytes: NF4, FP4 and LLM.int8() in the library's own formats and kernels."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import DataFreeBackend
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.quant_backends.layers.dense_products import DenseProducts
from lmms_plugin.quant_backends.layers.library import LibraryLinear
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.plans.storage_choice import Storage

FORMATS = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TENSOR_FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")


@dataclass(frozen=True)
class BitsAndBytesBackend(DataFreeBackend):
    """bitsandbytes: 4-bit NF4 or FP4, or LLM.int8() (Dettmers et al., 2022), which rounds activations too.

    At 4 bits the group size is the library's block size; blocks run through the weight row after row, across the ends
    of rows. At 8 bits there is one scale per row, whatever the group size, which the report shows.

    Attributes:
        format: Format of 4-bit weights, ``nf4`` or ``fp4``.
        double_quant: Whether the scales of 4-bit blocks are quantized too.
        outlier_threshold: Magnitude above which an input column is multiplied in 16 bits, for 8-bit weights; 0 for
            none.
    """

    name = "bitsandbytes"
    bits = frozenset({4, 8})
    unsaved = "bitsandbytes keeps weights in a form of its own"

    format: str = "nf4"
    double_quant: bool = False
    outlier_threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if not self.outlier_threshold >= 0:
            raise ValueError(f"outlier_threshold must be 0 or above, got {self.outlier_threshold}")

    def check(self, plan: QuantPlan) -> None:
        """Refuse a plan that the library cannot carry out, or a missing library."""
        super().check(plan)
        require("bitsandbytes", extra="bitsandbytes", user="quant_bitsandbytes")

    def check_storage(self, storage: Storage, plan: QuantPlan) -> None:
        """Refuse dense weights for LLM.int8(), which rounds inputs in a product of its own."""
        super().check_storage(storage, plan)
        if storage == "dense" and any(spec.bits == 8 for spec in plan.specs):
            raise ValueError("storage=dense: LLM.int8() (bits=8) multiplies integers by itself; leave storage out")

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse block sizes that the library lacks, and unsupported bits."""
        super().check_spec(spec)
        if spec.bits == 4 and spec.group_size not in BLOCKS:
            sizes = ", ".join(str(size) for size in BLOCKS)
            raise ValueError(f"bitsandbytes' 4-bit blocks have {sizes} weights, got group_size={spec.group_size}")

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer as ``Linear4bit`` and ``Linear8bitLt`` do."""
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

        if spec.bits == 4:
            assert spec.group_size is not None
            packed, state = quantize_4bit(
                weight.contiguous(),
                blocksize=spec.group_size,
                quant_type=self.format,
                compress_statistics=self.double_quant,
            )
            return FourBitLinear(packed, state, bias=bias)
        codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return Int8Linear(codes, scale, bias=bias, dtype=weight.dtype, outlier_threshold=self.outlier_threshold)


class FourBitLinear(DenseProducts, LibraryLinear):
    """Linear layer over 4-bit blocks of bitsandbytes, with the same weights and products on every processor.

    On a CPU the library dequantizes and torch multiplies, in the dtype of the inputs. The library's own layer takes
    another path where the processor has avx512_bf16: whatever its ``compute_dtype``, it multiplies in bfloat16 with
    scales that are rounded to bfloat16, and repacks its weight in place for that. On a GPU the library multiplies.

    Args:
        packed: Packed codes, two per byte, any shape.
        state: ``QuantState`` of the library for a weight (rows, columns).
        bias: Bias, kept unchanged.
    """

    def __init__(self, packed: Tensor, state: Any, *, bias: nn.Parameter | None) -> None:
        fields = state.as_dict()
        parts = {name: torch.as_tensor(fields[name]) for name in _TENSOR_FIELDS if name in fields}
        rows, columns = state.shape
        super().__init__(columns, rows, {"packed": packed} | parts, bias=bias, bits=4, group_size=state.blocksize)
        self._constants = {name: value for name, value in fields.items() if name not in _TENSOR_FIELDS}

    def assemble(self, parts: Mapping[str, Tensor]) -> Any:
        """Return the library's ``QuantState`` over the given parts."""
        from bitsandbytes.functional import QuantState

        fields = self._constants | {name: part for name, part in parts.items() if name != "packed"}
        return QuantState.from_dict(fields, device=parts["packed"].device)

    def dequantize(self) -> Tensor:
        """Return the dense weight, (out_features, in_features)."""
        return self._decoded(self.stored.dtype)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(self.stored)
        # The library's AVX-512 code ignores that blocks run from one row into the next (0.50: weights are 20 % off), so
        # it never gets a row of the weight: a row is a block here, or all blocks.
        size = self.out_features * self.in_features
        blocks, rest = divmod(size, state.blocksize)
        state.shape = torch.Size((1, size) if rest else (blocks, state.blocksize))
        state.dtype = dtype
        dense: Tensor = dequantize_4bit(self._column, state)
        return dense.view(self.out_features, self.in_features)

    @property
    def _column(self) -> Tensor:
        # A first dimension of 1 makes the library transpose the result.
        return self.get_buffer("packed").view(-1, 1)

    @property
    def _on_cpu(self) -> bool:
        return self.get_buffer("packed").device.type == "cpu"

    @property
    def kernel(self) -> str:
        """Return the library, its format, and what multiplies."""
        made = self.multiplied("dense products" if self._on_cpu else "")
        return f"bitsandbytes {self._constants['quant_type']}" + (f", {made}" if made else "")

    @property
    def padded_columns(self) -> int:
        """Return 0: blocks continue from one row to the next."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        if self._on_cpu or self.kept is not None:
            return self.product(x, self.bias)
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: Tensor = matmul_4bit(x, self._column, self.stored, bias=bias)
        return product

    @property
    def device(self) -> torch.device:
        """Return the device where the layer computes."""
        return self.get_buffer("packed").device

    @property
    def operand_dtype(self) -> torch.dtype:
        """Return the dtype in which products read the weight."""
        dtype: torch.dtype = self.stored.dtype
        return dtype

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight as products read them."""
        return self.rows_of(lambda: self._decoded(dtype), start, stop)


class Int8Linear(LibraryLinear):
    """Linear layer of LLM.int8(): int8 rows times inputs that are rounded to int8 token by token.

    Args:
        codes: (rows, columns) int8.
        scale: (rows,) float32, the largest magnitude of each row.
        bias: Bias, kept unchanged.
        dtype: Dtype of the dense weight.
        outlier_threshold: Threshold, as in `BitsAndBytesBackend`.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, *, bias: nn.Parameter | None, dtype: torch.dtype, outlier_threshold: float
    ) -> None:
        rows, columns = codes.shape
        super().__init__(columns, rows, {"codes": codes, "scale": scale}, bias=bias, bits=8, group_size=columns)
        self.dtype, self.outlier_threshold = dtype, outlier_threshold
        # The library warns at every call that it works in float16; the kernel's name says so once instead.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def assemble(self, parts: Mapping[str, Tensor]) -> Any:
        """Return the library's ``MatmulLtState`` over the given parts."""
        from bitsandbytes import MatmulLtState

        state = MatmulLtState()
        state.CB, state.SCB = parts["codes"], parts["scale"]
        state.has_fp16_weights = state.is_training = False
        state.threshold = self.outlier_threshold
        return state

    def dequantize(self) -> Tensor:
        """Return the dense weight, (out_features, in_features)."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        dense: Tensor = int8_vectorwise_dequant(self.get_buffer("codes"), self.get_buffer("scale"))
        return dense.to(self.dtype)

    @property
    def kernel(self) -> str:
        """Return the library and its method."""
        outliers = f", outliers above {self.outlier_threshold:g}" if self.outlier_threshold else ""
        return f"bitsandbytes LLM.int8() in float16{outliers}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        from bitsandbytes import matmul

        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        product: Tensor = matmul(rows, self.get_buffer("codes"), bias=bias, state=self.stored)
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)
