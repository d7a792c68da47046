"""How weights are held while a model answers."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Storage = Literal["auto", "packed", "dense"]
STORAGES: tuple[str, ...] = get_args(Storage)


class LayerStorage(NamedTuple):
    """Storage of one layer.

    Attributes:
        kernel: What the layer runs on.
        resident_bytes: Bytes on the device where it computes.
        dense: Whether its dense weight is kept.
    """

    kernel: str
    resident_bytes: int
    dense: bool
