"""What tells one checkpoint from another, wherever it lies."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

BLOCKS, BLOCK = 64, 4096
_WEIGHTS = ("*.safetensors", "*.bin")


def fingerprint(folder: Path) -> str:
    """Fingerprint of a checkpoint's weights: SHA-256 of sizes and of 64 blocks of each file, spread evenly.

    Two trainings of one model differ almost everywhere, so a sample tells them apart; it takes milliseconds for any
    size. The same weights in another number of files have another fingerprint.

    Args:
        folder: With the weights.

    Raises:
        FileNotFoundError: If there are none.
    """
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), None)
    if files is None:
        raise FileNotFoundError(f"expected weights ({' or '.join(_WEIGHTS)}) in {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "big"))
        for block in blocks(file):
            digest.update(block)
    return digest.hexdigest()


def blocks(file: Path) -> Iterator[bytes]:
    """64 blocks of 4,096 bytes, spread evenly from the start of a file to its end; they overlap in a short one."""
    last = max(0, file.stat().st_size - BLOCK)
    with file.open("rb") as stream:
        for block in range(BLOCKS):
            stream.seek(last * block // (BLOCKS - 1))
            yield stream.read(BLOCK)
