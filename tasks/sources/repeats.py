"""Rows of datasets that are there more than once, under one identifier or under several."""

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
    """Refuse rows that a column, which tells them apart, says are there more than once.

    Args:
        place: the dataset, for the message.
        column: its name.
        values: of all rows, in their order.

    Raises:
        DatasetError: names the value and two rows of it.
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
    """Refuse rows that are there again under another identifier: all but a few say something else, or of another image.

    Images are told apart by the bytes that are stored, and read only of rows that are otherwise equal.

    Args:
        place: the dataset, for the message.
        what: rows hold, in words.
        said: of each row all but its image and its identifiers; rows with None are not looked at.
        images: of the same rows, undecoded; the only column.
        where: names a row for the message of an error.
        photographs: of each row the name of its photograph, where there are such names: rows that say the same of
            photographs of one name are equal, too.

    Raises:
        DatasetError: names two rows. Of fewer than one in twenty there is a warning, since a benchmark may itself hold
            a few.
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
    """Yield rows whose key an earlier one has, each with that one."""
    seen: dict[Hashable, int] = {}
    for row, key in keys:
        if seen.setdefault(key, row) != row:
            yield row, seen[key]


def _by_content(
    said: Sequence[Hashable], images: datasets.Dataset, where: Callable[[int], str]
) -> Iterator[tuple[int, Hashable]]:
    """Yield what is equal for rows that say the same of the same bytes, for rows that may be equal to another."""
    stored = images.with_format("arrow")
    keys = ((row, key) for row, key in enumerate(zip(said, _sizes(stored), strict=True)) if key[0] is not None)
    # Whole images are slow to read: what differs in size or in its middle need not be.
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
    """Yield the bytes of each row's image, without looking at them; None where they are in a file of their own."""
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
