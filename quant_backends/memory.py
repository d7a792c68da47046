"""How much memory quantization took, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """The highest memory use seen.

    Attributes:
        bytes: Summed over devices where there are several.
        source: What was counted.
    """

    bytes: int
    source: str


def reset_peak() -> None:
    """Start counting anew, on CUDA devices; the peak of a process cannot be reset."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def read_peak() -> Peak:
    """Return the peak since `reset_peak` of the CUDA allocator, or without CUDA the peak of the process."""
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return Peak(sum(torch.cuda.max_memory_allocated(index) for index in devices), "CUDA allocator, all devices")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Peak(peak, "resident memory of the process since its start")


def statistics_budget(device: torch.device) -> int:
    """Return the bytes that calibration statistics may take on a device: 4 GiB, or less where less is free."""
    largest = 4 << 30
    if device.type != "cuda":
        return largest
    free, _ = torch.cuda.mem_get_info(device)
    return min(largest, free // 2)


@contextmanager
def explained_out_of_memory(method: str) -> Iterator[None]:
    """Say what helps when a device is too small.

    Raises:
        torch.OutOfMemoryError: As it came, with advice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = "device_map=auto spreads the model over all devices, dtype=bfloat16 halves what stays dense"
        if method in ("none", "awq"):
            advice += "; rtn and hqq need no dense model in memory"
        raise torch.OutOfMemoryError(f"out of memory while loading for {method}: {advice} ({error})") from error


def return_freed_memory() -> None:
    """Hand freed blocks back to the system, where the C library is glibc.

    Packed layers and the short-lived dense ones alternate on the heap; glibc keeps the holes between them,
    which in the end would take as much as the dense model.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
