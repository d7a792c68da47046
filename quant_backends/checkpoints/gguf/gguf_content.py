"""Content of a GGUF file before it is written: what it says, and its tensors, each read when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import component_of, opened, parts_of, value_of
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import (
    TypeChoice,
    block_of,
    dequantized,
    expect_width,
    file_type,
    package,
    quantized,
)

_KEPT = (
    "_norm.",
    "norm.weight",
    "position_embd",
    "patch_embd",
    "ffn_gate_inp",
    "ssm_conv1d",
    "shortconv",
    "rope_freqs",
)
"""Parts of names of tensors that stay F32, as llama.cpp's own quantizer leaves them."""
_OF_THE_FORMAT = "GGUF."
_LABELS = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
"""What is written anew."""


class Tensor(NamedTuple):
    """One tensor to write.

    Attributes:
        name: As llama.cpp calls it.
        shape: Rows first, columns last.
        load: Function that returns its values in float32.
        exact: Whether it must stay F32 whatever is chosen.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray[Any, Any]]
    exact: bool = False

    @classmethod
    def of(cls, name: str, values: np.ndarray[Any, Any], *, exact: bool = False) -> Tensor:
        """Return a tensor whose values are there already."""
        return cls(name, values.shape, lambda: values, exact)


class Value(NamedTuple):
    """Something that a file says.

    Attributes:
        value: Number, text, truth value, or a list of such.
        kind: Name of its `gguf.GGUFValueType`.
        inner: That of a list's entries; None for what is no list.
    """

    value: Any
    kind: str
    inner: str | None = None

    @classmethod
    def of(cls, value: Any) -> Value:
        """Return a value with the type that llama.cpp expects of it: UINT32, FLOAT32, BOOL, STRING, or lists of them.

        Whole numbers of lists are INT32, which types of tokens are.
        """
        if isinstance(value, list):
            inner = cls.of(value[0]).kind if value else "STRING"
            return cls(value, "ARRAY", "INT32" if inner == "UINT32" else inner)
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
        return cls(value, kinds[type(value)])


@dataclass(frozen=True)
class GgufContent:
    """Content of one file.

    Attributes:
        architecture: As llama.cpp calls it.
        values: Name -> what the file says under it.
        tensors: In the order of the file.
    """

    architecture: str
    values: Mapping[str, Value]
    tensors: Sequence[Tensor]

    def type_of(self, tensor: Tensor, choice: TypeChoice) -> str:
        """Return the type in which a tensor is written."""
        matrix = len(tensor.shape) > 1 and tensor.name.endswith(".weight")
        if tensor.exact or not matrix or any(part in tensor.name for part in _KEPT):
            return "F32"
        component = component_of(tensor.name, self.architecture)
        # A connector is small, and what it carries is in no range that 16 bits hold for sure.
        return "F32" if component == "connector" else choice.of(component)

    def expect_writable(self, choice: TypeChoice) -> None:
        """Refuse types that do not fit a tensor's width, before any is quantized.

        Raises:
            ValueError: Names tensor, width and type.
        """
        for one in self.tensors:
            expect_width(one.name, one.shape, self.type_of(one, choice))

    def write(self, path: Path, choice: TypeChoice) -> None:
        """Write the file, one tensor after the other.

        Raises:
            ValueError: As `expect_writable`.
            ImportError: A package that quantizes is not installed.
        """
        gguf = package("writing GGUF files")
        self.expect_writable(choice)
        kinds = [self.type_of(one, choice) for one in self.tensors]
        writer = gguf.GGUFWriter(path, self.architecture)
        for name, said in self.values.items():
            inner = None if said.inner is None else gguf.GGUFValueType[said.inner]
            writer.add_key_value(name, said.value, gguf.GGUFValueType[said.kind], inner)
        matrices = [kind for one, kind in zip(self.tensors, kinds, strict=True) if len(one.shape) > 1]
        writer.add_file_type(file_type(max(matrices, key=matrices.count)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for one, kind in zip(self.tensors, kinds, strict=True):
            shape, dtype, size = _stored(one.shape, kind)
            writer.add_tensor_info(one.name, shape, dtype, size, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one, kind in zip(self.tensors, kinds, strict=True):
            writer.write_tensor_data(_quantized(one, kind))
        writer.close()


def _quantized(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    try:
        return quantized(tensor.load(), kind)
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from error


def _stored(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape and data type of a tensor as it is stored, and its size in bytes."""
    if kind in ("F32", "F16"):
        dtype = np.dtype(np.float32 if kind == "F32" else np.float16)
        return shape, dtype, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    columns, size = block_of(kind)
    rows = (*shape[:-1], shape[-1] // columns * size)
    return rows, np.dtype(np.uint8), int(np.prod(rows, dtype=np.int64))


def content_of(path: Path) -> GgufContent:
    """Return the content of a file, for writing it in other types.

    Raises:
        ValueError: It is no GGUF file, or damaged or cut off.
    """
    readers = [opened(part) for part in parts_of(path)]
    values = {
        name: Value(field.contents(), field.types[0].name, field.types[1].name if len(field.types) > 1 else None)
        for name, field in readers[0].fields.items()
        if not name.startswith((_OF_THE_FORMAT, "split.")) and name not in _LABELS
    }
    tensors = [_read(one) for reader in readers for one in reader.tensors]
    return GgufContent(str(value_of(readers[0], "general.architecture")), values, tensors)


def _read(tensor: Any) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = tensor.tensor_type.name
    return Tensor(str(tensor.name), shape, lambda: dequantized(tensor.data, kind).reshape(shape))
