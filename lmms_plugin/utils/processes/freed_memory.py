"""Memory that a process frees: whether the system gets it back. Where the C library is not Linux's nothing changes."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of the settings in the C library's `malloc.h`."""
_KEPT = 256 << 20
_MOST_MMAP_THRESHOLD = 32 << 20
"""Largest one that the C library takes."""


def give_back_freed_memory() -> None:
    """Give the system the memory that this process has freed between other memory that it still holds."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Have this process keep up to 256 MB that it frees, for what it allocates next.

    The C library of Linux gives arrays of 128 kB and more back to the system one by one and asks for the next ones
    anew, and the system clears each of their pages before it is used. Measuring a run makes thousands of such arrays,
    and took 1.2 times as long.
    """
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
        library.mallopt(_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
