"""Deterministic pseudo-random numbers, equal in every run, on every machine and in every order of calls."""

import hashlib


def uniform(text: str) -> float:
    """Return a number in [0, 1) from the text alone, as if drawn uniformly: the first 64 bits of its BLAKE2b."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
