"""Reading of GGUF files: what a file is, by the types of its tensors and not by its name or what it says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import block_of, dequantized, package
from lmms_plugin.utils.messages import counted
from lmms_plugin.utils.reading.readable import readable

PROJECTOR = "clip"
"""Architecture that files with a vision tower and its connector name."""
_MAGIC = b"GGUF"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_DENSE_BITS = 16


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: As llama.cpp calls it.
        component: vision, connector, audio, embedding, language or head.
        type: Type of its values, for instance Q4_0.
        shape: Rows first, columns last, as in PyTorch.
        bytes: Size in the file, scales included.
    """

    name: str
    component: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def weights(self) -> int:
        """Return the number of values."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class TypeRow:
    """Tensors of one type in one component.

    Attributes:
        component: As in `TensorEntry`.
        type: Type of all of them.
        tensors: Number of them.
        weights: Number of their values.
        bytes: Their size in the file.
    """

    component: str
    type: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Return bits per value, scales included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class GgufFile:
    """What is in a GGUF file, or in the files that one model is split into.

    Attributes:
        path: Of the (first) file.
        architecture: `clip` for a vision tower with its connector, else that of the language model.
        stated: What the file says of itself, for instance `MOSTLY_Q4_K_M`; None where it says nothing.
        projector: Kind of the connector; None in a language model's file.
        tensors: All tensors, in the order of the file.
    """

    path: Path
    architecture: str
    stated: str | None
    projector: str | None
    tensors: tuple[TensorEntry, ...]

    @property
    def histogram(self) -> tuple[TypeRow, ...]:
        """Return one row for each component and type, in the order of the file."""
        groups: dict[tuple[str, str], list[TensorEntry]] = {}
        for one in self.tensors:
            groups.setdefault((one.component, one.type), []).append(one)
        return tuple(
            TypeRow(component, kind, len(all_of), sum(one.weights for one in all_of), sum(one.bytes for one in all_of))
            for (component, kind), all_of in groups.items()
        )

    @property
    def quantized(self) -> tuple[TensorEntry, ...]:
        """Return the tensors of fewer than 16 bits."""
        return tuple(one for one in self.tensors if 8 * one.bytes < _DENSE_BITS * one.weights)

    @property
    def main_type(self) -> str:
        """Return the type that most weights have."""
        counts: dict[str, int] = {}
        for one in self.tensors:
            counts[one.type] = counts.get(one.type, 0) + one.weights
        return max(counts, key=lambda kind: counts[kind])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        rows = [
            {
                "component": row.component,
                "type": row.type,
                "tensors": row.tensors,
                "weights": row.weights,
                "bytes": row.bytes,
                "bits_per_weight": row.bits_per_weight,
            }
            for row in self.histogram
        ]
        return {
            "file": self.path.name,
            "architecture": self.architecture,
            "stated": self.stated,
            "projector": self.projector,
            "bits_per_weight": bits_per_weight(self.tensors),
            "bits_per_quantized_weight": bits_per_weight(self.quantized) if self.quantized else None,
            "types": rows,
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> str:
        """Return a few lines for the terminal: one per component and type, then totals."""
        lines = [f"{'component':<10} {'type':<6} {'tensors':>7} {'weights':>13} {'MB':>9} {'bits':>6}"]
        for row in self.histogram:
            size, bits = f"{row.bytes / 1e6:.2f}", f"{row.bits_per_weight:.2f}"
            lines.append(f"{row.component:<10} {row.type:<6} {row.tensors:>7} {row.weights:>13,} {size:>9} {bits:>6}")
        return "\n".join([*lines, self.total()])

    def total(self) -> str:
        """Return what the file is in one line: tensors, main type, bits per weight, and what it says of itself."""
        said = f"it says of itself: {self.stated}" if self.stated else "it says nothing of its types"
        total = f"{bits_per_weight(self.tensors):.2f} bits per weight"
        quantized = f", {bits_per_weight(self.quantized):.2f} per quantized weight" if self.quantized else ""
        kind = f"{self.architecture}, {self.projector}" if self.projector else self.architecture
        return (
            f"{self.path.name} ({kind}): {counted(len(self.tensors), 'tensor')}, mostly {self.main_type}, "
            f"{total}{quantized}; {said}"
        )


def bits_per_weight(tensors: Sequence[TensorEntry]) -> float:
    """Return bits per weight of tensors, scales and minima counted."""
    return 8 * sum(one.bytes for one in tensors) / sum(one.weights for one in tensors)


def component_of(tensor: str, architecture: str) -> str:
    """Return the component that a tensor belongs to, by its name: llama.cpp has one naming for all families."""
    if architecture == PROJECTOR:
        first, _, rest = tensor.partition(".")
        return "audio" if first == "a" or rest.startswith("a.") else "vision" if first == "v" else "connector"
    return {"token_embd": "embedding", "output": "head"}.get(tensor.partition(".")[0], "language")


def expect_gguf(path: Path) -> None:
    """Refuse a path that is no GGUF file, by its first bytes.

    Raises:
        ValueError: There is no file, or another one.
    """
    if not path.is_file():
        raise ValueError(f"expected a GGUF file, and there is none at {path}")
    with path.open("rb") as stream:
        start = stream.read(len(_MAGIC))
    if start != _MAGIC:
        raise ValueError(f"{path}: expected a GGUF file, which begins with the bytes GGUF, got {start!r}")


def read(path: Path) -> GgufFile:
    """Read what is in a GGUF file; no tensor's values are read.

    Args:
        path: Of the file; of a model in several files the first one, with the others beside it.

    Raises:
        ValueError: It is no GGUF file, or it is damaged or cut off, or a part of the model is missing.
        ImportError: The package `gguf` is not installed.
    """
    readers = [opened(part) for part in parts_of(path)]
    first = readers[0]
    architecture = str(value_of(first, "general.architecture") or "")
    if not architecture:
        raise ValueError(f"{path}: expected general.architecture in a GGUF file, got none")
    tensors = tuple(_entry(one, architecture) for reader in readers for one in reader.tensors)
    if not tensors:
        raise ValueError(f"{path}: expected tensors in a GGUF file, got none (a vocabulary alone?)")
    return GgufFile(
        path, architecture, _stated(value_of(first, "general.file_type")), _projector(first, architecture), tensors
    )


def parts_of(path: Path) -> list[Path]:
    """Return the files of one model: those of its name, numbered, or the file alone.

    Raises:
        ValueError: One of them is missing.
    """
    expect_gguf(path)
    match = _SHARD.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    files = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for file in files:
        expect_gguf(file)
    return files


def is_later_part(path: Path) -> bool:
    """Return whether a file is a part of a model in several files, and not the first one."""
    match = _SHARD.search(path.name)
    return match is not None and int(match[1]) != 1


def opened(path: Path) -> Any:
    """Return a `gguf.GGUFReader` of a file.

    Raises:
        ValueError: It is no GGUF file, or damaged or cut off.
        ImportError: The package `gguf` is not installed.
    """
    gguf = package("reading GGUF files")
    expect_gguf(path)
    with readable(path):
        return gguf.GGUFReader(path)


def value_of(reader: Any, name: str) -> Any:
    """Return what a file says under a name; None where it says nothing."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def matrices(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield name and values, in float32, of every tensor of a file: what llama.cpp computes with, but for rounding.

    Raises:
        ValueError: As `read`.
    """
    for part in parts_of(path):
        for one in opened(part).tensors:
            yield one.name, dequantized(one.data, one.tensor_type.name).reshape(_shape(one))


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _entry(tensor: Any, architecture: str) -> TensorEntry:
    name, kind = str(tensor.name), tensor.tensor_type.name
    columns, size = block_of(kind)
    count = int(np.prod(_shape(tensor), dtype=np.int64))
    return TensorEntry(name, component_of(name, architecture), kind, _shape(tensor), count // columns * size)


def _stated(number: Any) -> str | None:
    gguf = package()
    known = {int(kind): kind.name for kind in gguf.LlamaFileType}
    return None if number is None else known.get(int(number), str(number))


def _projector(reader: Any, architecture: str) -> str | None:
    if architecture != PROJECTOR:
        return None
    found = value_of(reader, "clip.projector_type") or value_of(reader, "clip.vision.projector_type")
    return None if found is None else str(found)
