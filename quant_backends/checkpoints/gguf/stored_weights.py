"""Weights of a checkpoint, read one by one as float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lmms_plugin.utils.reading.readable import readable


@dataclass
class StoredWeights:
    """Tensors of a checkpoint's safetensors files; each that is asked for is noted, so that none is forgotten.

    Attributes:
        folder: Of the checkpoint.
        places: Name of a tensor -> its file.
        used: Names that were asked for.
    """

    folder: Path
    places: dict[str, Path] = field(default_factory=dict, init=False)
    used: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        for file in sorted(self.folder.glob("*.safetensors")):
            with readable(file), safe_open(file, framework="pt") as stored:
                self.places |= dict.fromkeys(stored.keys(), file)
        if not self.places:
            raise ValueError(f"expected weights (*.safetensors) in {self.folder}, got none")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            ValueError: There is no such tensor.
        """
        with safe_open(self._place(name), framework="pt") as stored:
            return tuple(stored.get_slice(name).get_shape())

    def load(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor's values in float32.

        Raises:
            ValueError: There is no such tensor, or it is quantized already.
        """
        with safe_open(self._place(name), framework="pt") as stored:
            values = stored.get_tensor(name)
        if not values.is_floating_point():
            raise ValueError(f"{self.folder}: expected numbers of floating point in {name}, got {values.dtype}")
        loaded: np.ndarray[Any, Any] = values.float().numpy()
        return loaded

    @property
    def is_half(self) -> bool:
        """Return whether the first matrix has 16 bits."""
        name = next(iter(self.places))
        with safe_open(self.places[name], framework="pt") as stored:
            return bool(stored.get_tensor(name).dtype in (torch.float16, torch.bfloat16))

    def expect_all_used(self, ignored: Iterable[str] = ()) -> None:
        """Refuse a checkpoint with tensors that nobody asked for: they would be missing in what is written.

        Raises:
            ValueError: Names the first of them.
        """
        left = sorted(self.places.keys() - self.used - set(ignored))
        if left:
            raise ValueError(
                f"{self.folder}: expected the weights of a plain model, got {left[0]} besides ({len(left)} such); "
                "it cannot be written as GGUF here"
            )

    def _place(self, name: str) -> Path:
        if name not in self.places:
            raise ValueError(f"{self.folder}: expected a weight called {name}, got none")
        self.used.add(name)
        return self.places[name]
