"""Types of GGUF tensors: which there are, how many bits they take, and their values to and from the bytes of a file.

The arithmetic is that of the packages `gguf` (llama.cpp's own, in numpy) and, for K-quants, `libgguf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from lmms_plugin.quant_backends.extras import require
from lmms_plugin.utils.suggest import unknown

BLOCKWISE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types with one scale, and in some a minimum, for 32 columns."""
K_QUANTS = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
"""Types with scales of scales for 256 columns."""
FLOATS = ("F32", "F16", "BF16")
TYPES = (*FLOATS, *BLOCKWISE, *K_QUANTS)
"""Types that matrices can be written in."""
_SMALLEST = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}
"""Type of a tensor -> name of llama.cpp's mixture that is nearly all of this type."""
_LARGEST_HALF = 65504.0
EXTRA, K_QUANTS_EXTRA = "gguf", "k-quants"


@dataclass(frozen=True)
class TypeChoice:
    """Types in which the matrices of a model are written; vectors, and what computes with positions, stay F32.

    Attributes:
        language: Type of the layers of the language model.
        embedding: Type of the token embedding; None for the same.
        output: Type of the output projection; None for the same.
        vision: Type of the vision tower; None for the checkpoint's own precision, F32 or F16.
    """

    language: str = "Q8_0"
    embedding: str | None = None
    output: str | None = None
    vision: str | None = None

    def __post_init__(self) -> None:
        for name in (self.language, self.embedding, self.output, self.vision):
            if name is not None and name not in TYPES:
                raise unknown("type of GGUF tensors", name, TYPES)

    def of(self, component: str) -> str:
        """Return the type of a component's matrices (`lmms_plugin.quant_backends.checkpoints.gguf.gguf_file`)."""
        chosen = {"embedding": self.embedding, "head": self.output, "vision": self.vision or "F32"}
        return chosen.get(component) or self.language


def package(user: str = "GGUF") -> ModuleType:
    """Import the package `gguf`.

    Raises:
        ImportError: It is not installed; the message holds the install command.
    """
    return require("gguf", extra=EXTRA, user=user)


def block_of(name: str) -> tuple[int, int]:
    """Return the columns of a block of this type, and the bytes that a block takes, scales included."""
    gguf = package()
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return int(columns), int(size)


def expect_width(tensor: str, shape: Sequence[int], name: str) -> None:
    """Refuse a tensor whose rows are no whole number of blocks.

    Raises:
        ValueError: So it is; names tensor, width and type.
    """
    columns, _ = block_of(name)
    if shape[-1] % columns:
        able = ", ".join(one for one in TYPES if shape[-1] % block_of(one)[0] == 0)
        raise ValueError(
            f"{tensor} has {shape[-1]} columns, and {name} takes whole blocks of {columns}: name a type that fits "
            f"({able})"
        )


def quantized(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return values as a file holds them.

    Args:
        values: Float32 of shape (..., columns).
        name: Type, of `TYPES`; its blocks divide the columns.

    Returns:
        Array of floats of the same shape for F32 and F16; else bytes of shape (..., bytes of a row).

    Raises:
        ValueError: A value is not finite, or too large for F16.
        ImportError: A K-quant is asked for, and `libgguf` is not installed.
    """
    gguf = package()
    values = np.ascontiguousarray(values, dtype=np.float32)
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise ValueError("the checkpoint's weight holds NaN or infinite values, which no type holds")
    if name == "F16" and largest > _LARGEST_HALF:
        raise ValueError(f"{name} cannot hold a value of {largest:g}; name a type of a larger range (F32, BF16)")
    kind = gguf.GGMLQuantizationType[name]
    if name in K_QUANTS:
        made = require("libgguf", extra=K_QUANTS_EXTRA, user=f"writing {name}").quantize_rows(values, kind.value)
    else:
        made = gguf.quants.quantize(values, kind)
    return np.ascontiguousarray(made)


def dequantized(stored: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Return what a file holds as float32 values; the inverse of `quantized`, but for what rounding took."""
    gguf = package()
    return np.asarray(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name]), dtype=np.float32)


def file_type(name: str) -> int:
    """Return llama.cpp's number for a file that is mostly of this type; it labels the file, and nothing rests on it."""
    gguf = package()
    return int(gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{_SMALLEST.get(name, name)}"])
