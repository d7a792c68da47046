"""Linear layers whose weight is stored in a library's own form.

The library's tensors are plain buffers here. So they are counted, moved, copied and saved like those of any layer, and
the report gives the true bytes, which the library itself hides behind a tensor of the dense shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.linear import QuantizedLinear


class LibraryLinear(QuantizedLinear):
    """Linear layer over a library's stored weight.

    Args:
        in_features: Number of columns of the weight.
        out_features: Number of rows of the weight.
        parts: Tensors of the library, by buffer name.
        bias: Bias, kept unchanged.
        bits: Number of bits per code.
        group_size: Number of columns that share a scale.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Mapping[str, Tensor],
        *,
        bias: nn.Parameter | None,
        bits: int,
        group_size: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        for name, part in parts.items():
            self.register_buffer(name, part.detach())
        self.bias = bias
        self._assembled: tuple[tuple[Tensor | None, ...], Any] | None = None
        self._dense: Tensor | None = None

    @abstractmethod
    def assemble(self, parts: Mapping[str, Tensor]) -> Any:
        """Return the library's own object over the given tensors, without copying them."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the dense weight, (out_features, in_features), as the library computes it."""

    @property
    def stored(self) -> Any:
        """Return the library's own object, assembled anew whenever buffers have been moved or loaded."""
        parts = tuple(self._buffers.values())
        if self._assembled is None or any(old is not new for old, new in zip(self._assembled[0], parts, strict=True)):
            self._assembled = parts, self.assemble(dict(self.named_buffers(recurse=False)))
        return self._assembled[1]

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of everything that the library stores for the weight."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers(recurse=False))

    @torch.no_grad()
    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the dense weight, (stop - start, in_features)."""
        return self.rows_of(self.dequantize, start, stop)

    def rows_of(self, make: Callable[[], Tensor], start: int, stop: int) -> Tensor:
        """Return rows of what a function makes of the whole weight."""
        # Libraries dequantize whole weights only, so the result is kept from the first block of rows to the last.
        dense = make() if self._dense is None or start == 0 else self._dense
        self._dense = dense if stop < self.out_features else None
        return dense[start:stop]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._assembled = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made from the buffers on demand."""
        return self.__dict__ | {"_assembled": None, "_dense": None}


@dataclass(frozen=True)
class _Layout:
    """Structure of a tensor subclass.

    Attributes:
        kind: Subclass.
        parts: Attribute -> buffer name, or the layout of an inner subclass.
        context: Non-tensor state of the subclass.
        size: Size of the outer tensor.
        stride: Stride of the outer tensor.
    """

    kind: type[Tensor]
    parts: Mapping[str, str | _Layout]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]

    def assemble(self, tensors: Mapping[str, Tensor]) -> Tensor:
        inner = {
            attribute: tensors[part] if isinstance(part, str) else part.assemble(tensors)
            for attribute, part in self.parts.items()
        }
        made: Tensor = self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)  # type: ignore[attr-defined]
        return made


def _take_apart(tensor: Tensor, prefix: str, tensors: dict[str, Tensor]) -> _Layout:
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts: dict[str, str | _Layout] = {}
    for attribute in names:
        inner, name = getattr(tensor, attribute), prefix + attribute.strip("_")
        if type(inner) is Tensor:
            tensors[name] = inner
            parts[attribute] = name
        else:
            parts[attribute] = _take_apart(inner, f"{name}_", tensors)
    return _Layout(type(tensor), parts, context, tensor.size(), tensor.stride())


class TensorLinear(LibraryLinear):
    """Linear layer over a tensor subclass with its own matrix product (quanto, torchao).

    Args:
        weight: Quantized weight, (out_features, in_features + padding), a subclass of Tensor.
        in_features: Number of columns without padding.
        bias: Bias, kept unchanged.
        bits: Number of bits per code.
        group_size: Number of columns that share a scale.
        library: Name of the library, for `kernel`.
    """

    def __init__(
        self, weight: Tensor, in_features: int, *, bias: nn.Parameter | None, bits: int, group_size: int, library: str
    ) -> None:
        parts: dict[str, Tensor] = {}
        layout = _take_apart(weight, "", parts)
        super().__init__(in_features, weight.shape[0], parts, bias=bias, bits=bits, group_size=group_size)
        self._layout, self._library = layout, library

    @property
    def padded_columns(self) -> int:
        """Return the number of padding columns of the stored weight."""
        return self._layout.size[1] - self.in_features

    def assemble(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor subclass over the given parts."""
        return self._layout.assemble(parts)

    def dequantize(self) -> Tensor:
        """Return the dense weight, (out_features, in_features)."""
        dense: Tensor = self.stored.dequantize()
        return dense[:, : self.in_features]

    @property
    def kernel(self) -> str:
        """Return the library and the tensor class that it dispatches on."""
        return f"{self._library} {self._layout.kind.__name__}"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, shape (..., out_features)."""
        if self.padded_columns:
            x = functional.pad(x, (0, self.padded_columns))
        return functional.linear(x, self.stored, self.bias)


def pad_columns(weight: Tensor, multiple: int) -> Tensor:
    """Pad a weight (rows, columns) with zero columns to a multiple."""
    padding = -weight.shape[1] % multiple
    return functional.pad(weight, (0, padding)) if padding else weight
