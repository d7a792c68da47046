"""Memory that a process frees: whether the system gets it back."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of the settings in the C library's `malloc.h`."""
_KEPT = 256 << 20
_MOST_MMAP_THRESHOLD = 32 << 20
"""Largest one that the C library takes."""


def keep_freed_memory() -> None:
    """Have this process keep up to 256 MB that it frees, for what it allocates next.

    The C library of Linux gives arrays of 128 kB and more back to the system one by one and asks for the next ones
    anew, and the system clears each of their pages before it is used. Measuring a run makes thousands of such arrays,
    and took 1.2 times as long. Where the C library is another one nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
