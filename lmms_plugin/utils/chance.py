"""Chance that is the same in every run, on every machine and for every order of asking."""

import hashlib


def uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, as if drawn uniformly: the first 64 bits of its BLAKE2b."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
