"""One error, with advice, for all errors that libraries raise when a device or the host is out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_OF_THE_HOST = ("DefaultCPUAllocator", "can't allocate memory")
"""Texts of torch's plain RuntimeError when the host is out of memory."""


class OutOfMemory(torch.OutOfMemoryError):
    """Memory is insufficient; the message says what helps."""


def while_answering(rows: int) -> AbstractContextManager[None]:
    """Add to a memory error which arguments make a batch smaller.

    Args:
        rows: Number of requests in the batch.
    """
    first = f"batch_size (now {rows} requests), " if rows > 1 else ""
    return _explained(
        "answering",
        f"a smaller {first}max_pixels, bits or vision_bits, max_new_tokens takes less; dtype=bfloat16 halves what is "
        "dense; device_map=auto spreads the model over all devices",
    )


def while_loading(method: str, *, calibrated: bool = False) -> AbstractContextManager[None]:
    """Add to a memory error what helps when a model cannot be loaded or quantized.

    Args:
        method: Name of the quantization backend.
        calibrated: Whether the method uses activations.
    """
    advice = "device_map=auto spreads the model over all devices, dtype=bfloat16 halves what stays dense"
    if calibrated:
        advice += (
            "; fewer calibration_samples or smaller images (max_pixels) take less; with calibration=noise or "
            "dataset:... the dense model need not write answers; blocks that are finished are kept for the next try; "
            "rtn and hqq need no calibration"
        )
    elif method == "none":
        advice += "; rtn and hqq need no dense model in memory"
    return _explained(f"loading for {method}", advice)


@contextmanager
def _explained(doing: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory while {doing}: {advice} ({error or type(error).__name__})") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _OF_THE_HOST)
