"""Storage of keys and values in the cache of a model: frozen values, pure Python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from lmms_plugin.quant_backends.plans.specs import UNTOUCHED_BITS

CacheFormat = Literal["int", "fp8_e4m3", "fp8_e5m2"]
KeyAxis = Literal["channel", "token"]
CachePart = Literal["both", "keys", "values"]
CacheRotation = Literal["none", "hadamard"]
FP8_BITS = 8
SCALE_BITS = 16
"""Bits of a scale, and of a zero point."""
DEFAULT_GROUP = 32
"""Elements that share a scale, as in KIVI (arXiv 2402.02750)."""
NOTHING_KEPT = "0+0"


@dataclass(frozen=True)
class CacheSpec:
    """Storage of keys and values.

    Attributes:
        bits: Bits of the keys and values of text tokens, 2 to 8; 16 leaves them as they are.
        image_bits: Bits of those of image tokens.
        format: `int` rounds to a uniform grid between the smallest and the largest element of a group; `fp8_e4m3` and
            `fp8_e5m2` are the 8-bit floats.
        group_size: Elements that share a scale: consecutive tokens of one channel, or consecutive channels of one
            token. None for 32 where that divides the size of a head, else the whole head; for a float without scale.
        key_axis: Whether the elements of a group of keys are those of one channel (KIVI) or of one token. Groups of
            values are always those of a token.
        part: Which are quantized.
        keep_first: Number of tokens at the beginning of a sequence that stay as they are.
        keep_last: Number of tokens at its current end that stay as they are.
        rotation: `hadamard` rounds each head of keys and values in a rotated basis, as after QuaRot's online rotation
            of queries and keys.
    """

    bits: int
    image_bits: int
    format: CacheFormat = "int"
    group_size: int | None = None
    key_axis: KeyAxis = "channel"
    part: CachePart = "both"
    keep_first: int = 0
    keep_last: int = 0
    rotation: CacheRotation = "none"

    @classmethod
    def from_arguments(
        cls,
        *,
        bits: int | None,
        image_bits: int | None,
        format: CacheFormat,
        group_size: int | None,
        key_axis: KeyAxis,
        part: CachePart,
        keep: str,
        rotation: CacheRotation = "none",
    ) -> CacheSpec | None:
        """Return the storage that a user asks for; None for a cache as the model has it.

        Args:
            bits: As `bits`; None for 8 in an 8-bit float, else 16.
            image_bits: As `image_bits`; None for `bits`.
            format: As `format`.
            group_size: As `group_size`.
            key_axis: As `key_axis`.
            part: As `part`.
            keep: `FIRST+LAST`, the tokens that stay as they are.
            rotation: As `rotation`.

        Raises:
            ValueError: A value has no effect, or they contradict each other.
        """
        first, last = _kept(keep)
        is_float = format != "int"
        text = bits if bits is not None else FP8_BITS if is_float else UNTOUCHED_BITS
        image = text if image_bits is None else image_bits
        spec = cls(text, image, format, group_size, key_axis, part, first, last, rotation)
        if spec.untouched:
            asked = {
                "kv_format": is_float,
                "kv_group_size": group_size is not None,
                "kv_keys": key_axis != "channel",
                "kv_part": part != "both",
                "kv_keep": bool(first or last),
                "kv_rotation": rotation != "none",
            }
            if useless := next((name for name, given in asked.items() if given), None):
                raise ValueError(f"{useless} says nothing without kv_bits or kv_image_bits below 16")
            return None
        for name, count in (("kv_bits", text), ("kv_image_bits", image)):
            if is_float and count not in (FP8_BITS, UNTOUCHED_BITS):
                raise ValueError(f"{name}: {format} has 8 bits (16 leaves these tokens as they are), got {count}")
        if is_float and group_size is None and key_axis != "channel":
            raise ValueError("kv_keys says nothing about a float without scales: give kv_group_size as well")
        return spec

    @property
    def untouched(self) -> bool:
        """Return whether nothing is quantized."""
        return {self.bits, self.image_bits} == {UNTOUCHED_BITS}

    @property
    def scaled(self) -> bool:
        """Return whether groups have scales, which a float without group size has not."""
        return self.format == "int" or self.group_size is not None

    @property
    def keys_by_channel(self) -> bool:
        """Return whether keys are quantized in groups of tokens."""
        return self.scaled and self.key_axis == "channel"

    @property
    def group_bits(self) -> int:
        """Return the bits of a group's scale and zero point; the grid of a float has no zero point."""
        return SCALE_BITS * (2 if self.format == "int" else 1) if self.scaled else 0

    def bits_of(self, *, is_image: bool) -> int:
        """Return the bits of a token's keys and values."""
        return self.image_bits if is_image else self.bits

    def group_of(self, width: int) -> int:
        """Return how many elements of a token, or tokens of a channel, share a scale.

        Args:
            width: Size of a head.

        Raises:
            ValueError: The group size does not divide the size of a head.
        """
        if self.group_size is None:
            return DEFAULT_GROUP if width % DEFAULT_GROUP == 0 else width
        if width % self.group_size:
            raise ValueError(f"kv_group_size: expected a divisor of the size of a head, {width}, got {self.group_size}")
        return self.group_size

    @property
    def rotated(self) -> bool:
        """Return whether heads are rotated before they are rounded."""
        return self.rotation != "none"

    @property
    def name(self) -> str:
        """Return the format and bits as in tables: `int4`, `int4, images int2`, `int4 keys rotated`."""
        text, image = (self._named(bits) for bits in (self.bits, self.image_bits))
        which = ("" if self.part == "both" else f" {self.part}") + (" rotated" if self.rotated else "")
        return f"{text}{which}" if text == image else f"{text}, images {image}{which}"

    def _named(self, bits: int) -> str:
        if bits == UNTOUCHED_BITS:
            return str(bits)
        return f"int{bits}" if self.format == "int" else self.format


def _kept(keep: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})\+(\d{1,9})", keep)
    if not found:
        raise ValueError(f"kv_keep: expected numbers of first and last tokens such as 4+32, got {keep!r}")
    return int(found[1]), int(found[2])


CACHE_FORMATS: tuple[str, ...] = get_args(CacheFormat)
KEY_AXES: tuple[str, ...] = get_args(KeyAxis)
CACHE_PARTS: tuple[str, ...] = get_args(CachePart)
CACHE_ROTATIONS: tuple[str, ...] = get_args(CacheRotation)
