"""What helps where a device, or the host, has no room: one error with advice for all kinds that libraries raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_OF_THE_HOST = ("DefaultCPUAllocator", "can't allocate memory")
"""What torch says where the host has no room: a plain RuntimeError."""


class OutOfMemory(torch.OutOfMemoryError):
    """There is no room for what was to be done; says what helps."""


def while_answering(rows: int) -> AbstractContextManager[None]:
    """Say which arguments help where a batch does not fit.

    Args:
        rows: Requests in the batch.
    """
    first = f"batch_size (now {rows} requests), " if rows > 1 else ""
    return _explained(
        "answering",
        f"a smaller {first}max_pixels, bits or vision_bits, max_new_tokens takes less; dtype=bfloat16 halves what is "
        "dense; device_map=auto spreads the model over all devices",
    )


def while_loading(method: str, *, calibrated: bool = False) -> AbstractContextManager[None]:
    """Say what helps where a model cannot be loaded or quantized.

    Args:
        method: Name of the quantization backend.
        calibrated: Whether it looks at activations.
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
