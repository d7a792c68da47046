"""How the weights of one layer are stored, and how plan files say it: frozen values, pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from lmms_plugin.utils import suggest

UNTOUCHED_BITS = 16
"""The number of bits that means: leave these weights as the checkpoint has them."""


@dataclass(frozen=True)
class QuantSpec:
    """How the weights of one linear layer are stored.

    Attributes:
        bits: Bits per weight, 2 to 8; 16 leaves the layer as it is.
        group_size: Consecutive input columns of one row that share a scale. None (or -1) means one
            scale for the whole row.
        symmetric: Zero point fixed in the middle of the code range instead of fitted to each group.
    """

    bits: int
    group_size: int | None = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not is_int(self.bits) or not (2 <= self.bits <= 8 or self.bits == UNTOUCHED_BITS):
            raise ValueError(f"bits must be an integer from 2 to 8, or 16 for untouched, got {self.bits!r:.200}")
        if self.group_size == -1:
            object.__setattr__(self, "group_size", None)
        if self.group_size is not None and (not is_int(self.group_size) or self.group_size < 1):
            raise ValueError(
                f"group_size must be a positive integer, or -1 for one group per row, got {self.group_size!r:.200}"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {self.symmetric!r:.200}")

    @property
    def untouched(self) -> bool:
        """Whether a layer with this spec keeps its weights."""
        return self.bits == UNTOUCHED_BITS


def is_int(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def expect_keys(entry: object, known: set[str], where: str) -> None:
    """Refuse an entry of a plan file that is no mapping, or holds other keys than `known`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with {', '.join(sorted(known))}, got {entry!r:.200}")
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
        raise ValueError(f"{where}: {suggest.unknown('key', unknown[0], sorted(known))}")


def read_spec(entry: object, default: QuantSpec, where: str) -> QuantSpec:
    """Return the spec that an entry of a plan file stands for.

    Args:
        entry: Bits, or a mapping with some of bits, group_size and symmetric.
        default: Where numbers come from that it leaves out.
        where: Names file and entry, for errors.

    Raises:
        ValueError: It is no such thing; the message begins with `where`.
    """
    entry = {"bits": entry} if isinstance(entry, int) else entry
    expect_keys(entry, {"bits", "group_size", "symmetric"}, where)
    assert isinstance(entry, dict)
    try:
        return QuantSpec(
            entry.get("bits", default.bits),
            entry.get("group_size", default.group_size),
            entry.get("symmetric", default.symmetric),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def write_spec(spec: QuantSpec | None) -> dict[str, Any] | None:
    """Return a spec as JSON-ready values."""
    if spec is None:
        return None
    return {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
