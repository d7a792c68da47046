"""Decoding of image files to pixels: upright, on white, 8 bits, RGB, and complete or an error.

The frame of an image, to which boxes and sizes refer, is the upright one: what a viewer shows after its EXIF
orientation is applied. Of a file with several frames (GIF, APNG, WebP, TIFF, MPO) the first one is taken.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

_TURNED = frozenset({5, 6, 7, 8})
_LATE_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


class ImageError(ValueError):
    """An image that cannot be shown to a model; says why. The caller adds which image it is."""


class Header(NamedTuple):
    """Size and orientation of an image file.

    Attributes:
        size: (width, height) of the upright image in pixels.
        turned: Whether its EXIF orientation exchanges width and height of the stored pixels.
    """

    size: tuple[int, int]
    turned: bool


File = str | os.PathLike[str] | Mapping[str, Any]
"""Path of an image file, or the undecoded form of `datasets`: a mapping of `bytes` and `path`."""


def opened(source: Image.Image | File) -> Image.Image:
    """Decode an image and convert it by `to_rgb`.

    Args:
        source: Image, lazy or decoded, or its file.

    Raises:
        ImageError: There is no file or it is empty, it is incomplete, it is not an image, it has more pixels than
            Pillow allows (`PIL.Image.MAX_IMAGE_PIXELS`), or `to_rgb` refuses it.
    """
    with strict(), _explained():
        return to_rgb(source if isinstance(source, Image.Image) else _image(content(source)))


def header(source: File) -> Header:
    """Read size and orientation of a file, without decoding pixels where the format allows that.

    Raises:
        ImageError: As `opened`, as far as the error shows without the pixels.
    """
    with strict(), _explained():
        data = content(source)
        image = _image(data)
        turned = _orientation(image, data) in _TURNED
        # Pillow itself returns the upright size of a TIFF.
        swap = turned and image.format != "TIFF"
        return Header(image.size[::-1] if swap else image.size, turned)


def content(source: File) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError: The file does not exist or is empty.
    """
    path = source.get("path") if isinstance(source, Mapping) else source
    data = source.get("bytes") if isinstance(source, Mapping) else None
    if data is None:
        if not path:
            raise ImageError("it has neither bytes nor a path")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ImageError(f"its file cannot be read: {error}") from error
    if not data:
        raise ImageError(f"its file{f' {path}' if path else ''} is empty (0 bytes)")
    return bytes(data)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as a viewer shows it on white paper, in mode RGB; an image in that form is returned unchanged.

    Its EXIF orientation is applied. Transparency is composited on white (viewers' page colour; dropping alpha would
    show pixels nobody has seen). 16-bit grey is scaled to 8 bits; mode I counts as 16-bit, which is what Pillow decodes
    some of it to.

    Raises:
        ValueError: The image has no pixels, a mode without a defined white (F) or without a conversion to RGB (LAB), or
            is in mode I with values outside 0 to 65535.
    """
    if 0 in image.size:
        raise ValueError(f"expected an image of at least 1x1 pixels, got {image.width}x{image.height}")
    # Decoding comes first: Pillow rotates a TIFF while it decodes it, and knows some metadata only then.
    image.load()
    if _orientation(image) not in (None, 1):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("expected an image of integers, got mode F (float), which has no defined white")
    if image.mode.startswith("I"):
        return _sixteen_bit_to_rgb(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        straight = image.convert("LA") if image.mode == "La" else image
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def told_apart(image: Image.Image) -> tuple[str, tuple[int, int], str]:
    """Return an identity of an image without palette: mode, (width, height) and a hash of the pixels."""
    return image.mode, image.size, hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()


_COUNT = Lock()
_decoding = 0
_lenient = False


@contextmanager
def strict() -> Iterator[None]:
    """Make truncated images errors in this context: lmms-eval tells Pillow, process-wide, to fill them with grey.

    Several threads may be inside at the same time; the first to enter and the last to leave change Pillow's flag.
    """
    global _decoding, _lenient
    with _COUNT:
        if _decoding == 0:
            _lenient = ImageFile.LOAD_TRUNCATED_IMAGES
        _decoding += 1
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _COUNT:
            _decoding -= 1
            if _decoding == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _lenient


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    # For a damaged file, Pillow's decoders raise various errors: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error


def _image(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        # Pillow names the buffer that it received, which is not informative.
        begun = data[:16]
        raise ImageError(
            f"it is no image of a format that Pillow knows (JPEG, PNG, ...); it begins {begun!r}"
        ) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"expected at most {limit:,} pixels, Pillow's limit, got {image.width}x{image.height}")
    return image


def _orientation(image: Image.Image, data: bytes | None = None) -> int | None:
    """Return the EXIF orientation; given the file's bytes, avoid decoding a PNG without metadata behind its pixels."""
    read = image.getexif
    if image.format == "PNG" and data is not None:
        start = data.find(b"IDAT")
        if all(data.find(mark, start) < 0 for mark in _LATE_METADATA):
            # Pillow's own method for PNG decodes all pixels to reach what is behind them.
            read = lambda: Image.Image.getexif(image)  # noqa: E731
    value = read().get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) else None


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode}: expected values in 0 to 65535, got {values.min()} to {values.max()}")
    levels = (values * 255 + 32767) // 65535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = 255
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
