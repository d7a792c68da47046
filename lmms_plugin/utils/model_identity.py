"""Identity of an unquantized model: what its answers and the inputs of its layers depend on, besides what it is asked.

What is kept under it lasts from run to run, so it holds more than the identity of a published result: of a local
checkpoint also when its files were last changed, since a hash of 64 blocks of a file misses a change of one layer.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmms_plugin.utils import hashing
from lmms_plugin.utils.files import State

_LIBRARIES = ("lmms-plugin", "torch", "transformers", "tokenizers", "torchvision", "pillow", "flash-attn")


def identity_of(path: str, model: Any, processor: Any) -> dict[str, Any]:
    """Return JSON-ready values that differ where another model may be meant.

    Args:
        path: Hub id or local folder of the weights.
        model: Model as loaded.
        processor: Processor that makes its inputs, which may be that of another checkpoint.
    """
    kind = type(model)
    return {
        "checkpoint": hashing.of_source(path, lambda _: getattr(model.config, "_commit_hash", None)),
        "changed": _changes(Path(path).expanduser()),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "processor": _of_processor(processor),
        "versions": {library: _version(library) for library in _LIBRARIES},
    }


def _changes(place: Path) -> str | None:
    """Return a hash of the states of a local checkpoint's files; None for one of the hub, whose commit tells all."""
    if not place.exists():
        return None
    return hashing.of_value([[name, *State.of(file)] for name, file in hashing.shown_files(place).items()])


def _of_processor(processor: Any) -> list[str]:
    """Return what a processor shows of itself, and what it does not: its template, and the rules of its tokenizer."""
    rules = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    told = "" if rules is None else hashing.of_bytes(rules.to_str().encode())
    return [repr(processor), str(getattr(processor, "chat_template", None)), told]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
