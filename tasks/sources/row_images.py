"""Images out of datasets, undamaged or not at all: `lmms_plugin.utils.images` with the row in its errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image

from lmms_plugin.utils import images
from lmms_plugin.utils.copies import DatasetError

Encoded = Mapping[str, Any] | None


def opened(encoded: Encoded, where: str) -> Image.Image:
    """Decode an image that `datasets` keeps undecoded: upright, on white, RGB.

    Args:
        encoded: bytes or path of the image file.
        where: the row, for the message of an error.

    Raises:
        DatasetError: there is no image, or it cannot be decoded completely.
    """
    with _of(where):
        return images.opened(_given(encoded, where))


def header(encoded: Encoded, where: str) -> images.Header:
    """Read the size of an image without decoding its pixels.

    Args:
        encoded: as `opened`.
        where: as `opened`.

    Raises:
        DatasetError: as `opened`, as far as it shows without the pixels.
    """
    with _of(where):
        return images.header(_given(encoded, where))


def content(encoded: Encoded, where: str) -> bytes:
    """Return the bytes of an image file.

    Args:
        encoded: as `opened`.
        where: as `opened`.

    Raises:
        DatasetError: there is no file, or nothing in it.
    """
    with _of(where):
        return images.content(_given(encoded, where))


def _given(encoded: Encoded, where: str) -> Mapping[str, Any]:
    if encoded is None:
        raise DatasetError(f"{where}: column 'image' is empty")
    return encoded


@contextmanager
def _of(where: str) -> Iterator[None]:
    try:
        yield
    except images.ImageError as error:
        raise DatasetError(f"{where}: column 'image' cannot be decoded: {error}") from error
