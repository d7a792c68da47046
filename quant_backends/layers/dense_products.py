"""Products with dense rows of a quantized weight: made for each product, or kept.

What a layer is (codes, scales, format) and how it is multiplied are two things. Codes stay whatever is kept beside
them: they are what is counted and saved.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.kernels import product_by_blocks, rows_at_once


class DenseProducts(nn.Module):
    """Part of a layer that multiplies by dense rows of its weight.

    Attributes:
        in_features: Number of columns of the weight.
        out_features: Number of rows of the weight.
        coded: Names of the buffers that are read only to make dense rows.
    """

    coded: ClassVar[tuple[str, ...]] = ()
    in_features: int
    out_features: int
    _keeps: bool = False
    _is_one_block: bool = False
    _kept: Tensor | None = None

    @abstractmethod
    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight as products read them, (stop - start, in_features), contiguous."""

    @property
    @abstractmethod
    def operand_dtype(self) -> torch.dtype:
        """Return the dtype in which products read the weight."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Return the device where the layer computes."""

    @property
    def undense(self) -> str | None:
        """Return why dense rows cannot be kept; None if they can."""
        return "its weight is offloaded" if any(buffer.is_meta for buffer in self.buffers()) else None

    @property
    def keeps(self) -> bool:
        """Return whether the dense weight is kept."""
        return self._keeps

    @property
    def kept(self) -> Tensor | None:
        """Return the dense weight that is kept, made anew where the layer has moved; None if none is."""
        if self._kept is None and self._keeps:
            self._make()
        return self._kept

    @property
    def operand_bytes(self) -> int:
        """Return the bytes of the dense weight, kept or not."""
        return self.in_features * self.out_features * self.operand_dtype.itemsize

    @property
    def resident_bytes(self) -> int:
        """Return the bytes on the device where the layer computes: codes where they are there, dense rows if kept."""
        held = [buffer for buffer in self.buffers() if buffer.device == self.device]
        return sum(buffer.numel() * buffer.element_size() for buffer in held) + self.operand_bytes * self._keeps

    def keep(self) -> None:
        """Keep the dense weight from now on; elsewhere than on a CPU, codes go to host memory."""
        self._keeps = True
        self._make()

    def drop(self) -> None:
        """Keep the dense weight no longer."""
        self._keeps, self._kept = False, None
        self._move_codes(self.device)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``, the same to the last bit whether dense rows are kept or made.

        Args:
            x: (..., in_features), in the dtype of the product.
            bias: (out_features,), in any dtype.
        """
        bias = None if bias is None else bias.to(x.dtype)
        kept = self.kept
        if kept is None or kept.dtype != x.dtype:
            return product_by_blocks(x, self.out_features, lambda a, b: self.operand(a, b, x.dtype), bias)
        return product_by_blocks(x, self.out_features, lambda a, b: kept[a:b], bias)

    def multiplied(self, made: str = "dequantize") -> str:
        """Return how the weight is multiplied, for reports.

        Args:
            made: Name for rows that are made for each product.
        """
        return f"dense {str(self.operand_dtype).removeprefix('torch.')}" if self._keeps else made

    def _make(self) -> None:
        # Kept for all later calls, which may need gradients of their inputs.
        with torch.no_grad(), torch.inference_mode(False):
            kept = torch.empty(self.out_features, self.in_features, dtype=self.operand_dtype, device=self.device)
            step = max(1, (1 << 22) // self.in_features)
            for start in range(0, self.out_features, step):
                stop = min(start + step, self.out_features)
                kept[start:stop] = self.operand(start, stop, kept.dtype)
            self._kept = kept
            self._is_one_block = self.out_features <= rows_at_once(self.in_features, kept.device.type)
            if kept.device.type != "cpu":
                self._move_codes(torch.device("cpu"))

    def _move_codes(self, device: torch.device) -> None:
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name.startswith(self.coded):
                    setattr(module, name, buffer.to(device))

    def _apply(self, fn: Any, recurse: bool = True) -> DenseProducts:
        self._kept = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made from the buffers on demand."""
        return {**super().__getstate__(), "_kept": None}
