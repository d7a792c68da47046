"""Files of tensors that several runs share: written atomically, and read only if every byte is as it was written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmms_plugin.utils import files

SUFFIX = ".safetensors"
SHARE_OF_DISK = 2
"""Tensors may take one part in so many of what is free on the disk."""
_ABANDONED_SECONDS = 24 * 3600
_DIGEST, _ABOUT = "sha256", "about"


def write(file: Path, tensors: Mapping[str, Tensor], about: Any = None) -> None:
    """Write tensors atomically with a digest of their bytes; a full disk keeps nothing, which is logged.

    Args:
        file: File whose name ends in `SUFFIX`; its folder is made.
        tensors: Tensors by name, on any device.
        about: JSON-ready value that goes with them.
    """
    # A copy each: tensors that share memory, as those cut from one batch do, are refused.
    there = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(about)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as unfinished:
            save_file(there, unfinished, {_ABOUT: text, _DIGEST: _digest(there, text)})
    # The library has an error of its own for what the system refuses.
    except (OSError, SafetensorError) as error:
        logger.warning(f"{file.name} is not kept in {file.parent} ({error}): other runs compute it again")


def read(file: Path, *, verify: bool = True) -> dict[str, Tensor] | None:
    """Return the tensors of a file; None if it is missing or damaged.

    Args:
        file: File that `write` wrote.
        verify: Whether to compare every byte with its digest.
    """
    found = read_with(file, verify=verify)
    return None if found is None else found[0]


def read_with(file: Path, *, verify: bool = True) -> tuple[dict[str, Tensor], Any] | None:
    """Return the tensors of a file and the value that goes with them; see `read`."""
    try:
        with safe_open(file, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            said = stream.metadata() or {}
        text = said.get(_ABOUT, "")
        about = json.loads(text)
    except (OSError, SafetensorError, ValueError):
        return None
    return None if verify and said.get(_DIGEST) != _digest(tensors, text) else (tensors, about)


def room_in(folder: Path, most_bytes: int, *, but: Container[Path] = ()) -> int:
    """Return how many bytes of tensors may be added to a folder: 0 if nothing can be written there.

    What killed processes left unfinished more than a day ago is removed, and what is younger counts.

    Args:
        folder: Folder of files at any depth; made.
        most_bytes: Bytes that it may hold.
        but: Files that do not count.
    """
    used = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(folder, _ABANDONED_SECONDS)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        logger.warning(f"{folder} cannot be used ({error})")
        return 0
    for file in folder.rglob("*"):
        # Another process may have replaced or removed it since.
        with suppress(OSError):
            used += 0 if file in but or file.is_symlink() or file.is_dir() else file.stat().st_size
    return max(0, min(most_bytes - used, free // SHARE_OF_DISK))


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the SHA-256 of a text, and of names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
