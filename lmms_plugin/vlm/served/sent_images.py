"""Images as a model sees them: resized by the checkpoint's own processor, and sent as lossless PNG of these pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lmms_plugin.utils import hashing

_FAST = 1
"""Level of zlib: the image goes over the wire once."""
_NAME = 32
"""Hexadecimal digits of an image's name."""


@dataclass
class Resizer:
    """Resizes an image as a checkpoint's processor does.

    Whether that processor leaves the resized image alone is tried for the first image of each size: only then it is
    sent in place of the image itself. Otherwise (tiles, padding, cropping) the image is sent as it is, and what the
    server's processor makes of it is the server's.

    Attributes:
        images: the checkpoint's image processor.
        kept: by (width, height) of the image whether the processor leaves the resized one alone.
    """

    images: Any
    kept: dict[tuple[int, int], bool] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock, init=False, repr=False, compare=False)

    def seen(self, image: Image.Image) -> Image.Image:
        """Return the pixels to send.

        Args:
            image: upright, RGB.
        """
        if self.kept.get(image.size) is False:
            return image
        with self._lock, self._watching() as made:
            values = self._values(image)
        resized = _picture(made[-1]) if made else None
        if image.size not in self.kept:
            self.kept[image.size] = resized is not None and self._leaves_alone(resized, values)
        return resized if resized is not None and self.kept[image.size] else image

    def _leaves_alone(self, resized: Image.Image, values: dict[str, Any]) -> bool:
        again = self._values(resized)
        return again.keys() == values.keys() and all(_equal(again[name], values[name]) for name in values)

    def _values(self, image: Image.Image) -> dict[str, Any]:
        return dict(self.images(images=[image], return_tensors="pt"))

    @contextmanager
    def _watching(self) -> Iterator[list[Any]]:
        """Note what the processor's own resizing returns."""
        made: list[Any] = []
        resize = getattr(self.images, "resize", None)
        if resize is None:
            yield made
            return

        def noting(*args: Any, **options: Any) -> Any:
            result = resize(*args, **options)
            made.append(result)
            return result

        self.images.resize = noting
        try:
            yield made
        finally:
            del self.images.resize


class SentImage(NamedTuple):
    """An image on its way to a server.

    Attributes:
        name: what stands for it in the body of a request, by its content.
        url: data URL of a PNG with exactly its pixels.
    """

    name: str
    url: bytes

    @classmethod
    def of(cls, image: Image.Image) -> SentImage:
        """Encode an image."""
        url = data_url(image).encode("ascii")
        return cls(f"image:{hashing.of_bytes(url)[:_NAME]}", url)


def data_url(image: Image.Image) -> str:
    """Return an image as a data URL of a PNG with exactly its pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=_FAST)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _picture(made: Any) -> Image.Image | None:
    """The one RGB image of 8 bits that a resize returned; None if it returned something else."""
    pixels = made.cpu().numpy() if isinstance(made, torch.Tensor) else np.asarray(made)
    while pixels.ndim > 3 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != np.uint8:
        return None
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(np.asarray(one, dtype=object), np.asarray(other, dtype=object)))
