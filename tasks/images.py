"""Images out of datasets, undamaged or not at all."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

from PIL import Image, ImageFile

_STRICT = Lock()


class DatasetError(ValueError):
    """A dataset that cannot be reached, or whose columns or values are not what the task documents."""


def opened(encoded: Mapping[str, Any] | None, where: str, *, load: bool) -> Image.Image:
    """Open an image as `datasets` keeps it undecoded.

    Args:
        encoded: bytes or path of the image file.
        where: the row, for the message of an error.
        load: whether to decode the pixels, too, instead of the header alone.

    Raises:
        DatasetError: there is no image, or it cannot be decoded completely.
    """
    if encoded is None:
        raise DatasetError(f"{where}: column 'image' is empty")
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"])
        if load:
            with _strict():
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: column 'image' cannot be decoded: {error}") from error
    return image


@contextmanager
def _strict() -> Iterator[None]:
    """Decode truncated images to an error: lmms-eval tells Pillow to fill them up with grey, process-wide."""
    with _STRICT:
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
