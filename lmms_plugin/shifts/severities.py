"""Common parts of image and language shifts: five severities, names, and random draws that follow from a key."""

import hashlib
from collections.abc import Mapping
from numbers import Integral
from typing import TypeVar

import numpy as np

from lmms_plugin.utils import suggest

SEVERITIES = (1, 2, 3, 4, 5)

Entry = TypeVar("Entry")


def named(name: str, registry: Mapping[str, Entry], kind: str = "shift") -> Entry:
    """Return the entry of that name.

    Raises:
        ValueError: There is none; the message gives the nearest name and all names.
    """
    if name not in registry:
        raise suggest.unknown(kind, name, registry)
    return registry[name]


def checked(severity: int, name: str) -> int:
    """Return the severity as an int.

    Raises:
        ValueError: It is not an integer from 1 to 5.
    """
    if isinstance(severity, bool) or not isinstance(severity, Integral) or severity not in SEVERITIES:
        raise ValueError(f"severity of {name}: expected an integer from 1 to 5, got {severity!r}")
    return int(severity)


def generator(key: str | int, name: str, severity: int) -> np.random.Generator:
    """Return a random generator that depends on (key, name, severity) alone, by hash; 7 and "7" are the same key.

    Raises:
        TypeError: A key that is neither text nor an integer.
    """
    if not isinstance(key, str | Integral):
        raise TypeError(f"expected a key of type str or int, got {type(key).__name__}")
    digest = hashlib.blake2b(f"{name}\0{severity}\0{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
