"""Detection of rows that occur more than once in a dataset, under one identifier or under several."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from loguru import logger

from lmms_plugin.tasks.sources.row_images import content
from lmms_plugin.utils.copies import REMEDY, DatasetError

if TYPE_CHECKING:
    import datasets

# A benchmark may itself hold a few rows twice.
_MOST_REPEATED = 0.05


def expect_once(place: str, column: str, values: Iterable[object]) -> None:
    """Refuse rows with equal identifiers.

    Args:
        place: Name of the dataset, for the message.
        column: Name of the identifying column.
        values: Identifiers of all rows, in their order.

    Raises:
        DatasetError: An identifier occurs twice; names it and its two rows.
    """
    seen: dict[object, int] = {}
    again = [(value, seen[value], row) for row, value in enumerate(values) if seen.setdefault(value, row) != row]
    if again:
        value, first, second = again[0]
        raise DatasetError(
            f"{place}: column {column!r}: expected every row once, got {value!r} in rows {first} and {second} "
            f"({len(again)} repeated of {len(again) + len(seen)} rows); {REMEDY}"
        )


def expect_different(
    place: str,
    what: str,
    said: Sequence[Hashable],
    images: datasets.Dataset,
    where: Callable[[int], str],
    photographs: Sequence[Hashable] | None = None,
) -> None:
    """Refuse rows that repeat under another identifier, unless they are few.

    Images are compared by their stored bytes, and are read only for rows that are otherwise equal.

    Args:
        place: Name of the dataset, for the message.
        what: What rows hold, in words.
        said: Content of each row without its image and its identifiers; rows with None are ignored.
        images: Images of the same rows, undecoded; the only column.
        where: Function that names a row for an error message.
        photographs: Name of each row's photograph, where there are such names: rows with equal content on photographs
            of one name are equal, too.

    Raises:
        DatasetError: More than one in twenty rows repeat; names two rows. Fewer give a warning, since a benchmark may
            itself hold a few.
    """
    again = dict(_repeats(_by_content(said, images, where)))
    if photographs is not None:
        named = zip(said, photographs, strict=True)
        again |= dict(_repeats((row, key) for row, key in enumerate(named) if key[0] is not None))
    if not again:
        return
    second = min(again)
    message = (
        f"{place}: expected every row once, but of {len(said)} rows {len(again)} repeat {what} of another, e.g. rows "
        f"{again[second]} and {second}"
    )
    if len(again) > _MOST_REPEATED * len(said):
        raise DatasetError(f"{message}; {REMEDY}")
    logger.warning("{}: they count twice", message)


def _repeats(keys: Iterable[tuple[int, Hashable]]) -> Iterator[tuple[int, int]]:
    """Yield rows whose key an earlier row has, each with that row."""
    seen: dict[Hashable, int] = {}
    for row, key in keys:
        if seen.setdefault(key, row) != row:
            yield row, seen[key]


def _by_content(
    said: Sequence[Hashable], images: datasets.Dataset, where: Callable[[int], str]
) -> Iterator[tuple[int, Hashable]]:
    """Yield a key of equal content and equal bytes, for rows that may be equal to another."""
    stored = images.with_format("arrow")
    keys = ((row, key) for row, key in enumerate(zip(said, _sizes(stored), strict=True)) if key[0] is not None)
    # Whole images are slow to read: size and a middle part already distinguish most.
    for key, rows in _several(keys):
        contents = {row: _content(stored, row, where) for row in rows}
        for middle, alike in _several((row, _middle(data)) for row, data in contents.items()):
            for row in alike:
                yield row, (key, middle, hashlib.sha256(contents[row]).digest())


def _several(keys: Iterable[tuple[int, Hashable]]) -> Iterator[tuple[Hashable, list[int]]]:
    """Yield keys that several rows have, each with these rows."""
    alike: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, key in keys:
        alike[key].append(row)
    return ((key, rows) for key, rows in alike.items() if len(rows) > 1)


def _sizes(stored: datasets.Dataset) -> Iterator[int | None]:
    """Yield the size in bytes of each row's image, without reading it; None for an image in a file of its own."""
    import pyarrow.compute as pc

    (column,) = stored.column_names
    for batch in stored.iter(256):
        yield from pc.binary_length(pc.struct_field(batch[column], "bytes")).to_pylist()


def _content(stored: datasets.Dataset, row: int, where: Callable[[int], str]) -> memoryview:
    (column,) = stored.column_names
    encoded = stored[row][column][0]
    data = encoded["bytes"] if encoded.is_valid else encoded
    return memoryview(data.as_buffer() if data.is_valid else content(encoded.as_py(), where(row)))


def _middle(data: memoryview) -> bytes:
    start = len(data) // 2
    return bytes(data[start : start + 1024])
