"""Local copies of datasets: which files are a split, that they hold all of it, and that they hold it once.

A split held twice (an older snapshot beside a newer one, a backup) would be asked twice, and intervals would shrink by
√2 although nothing new was seen. A part of a split would pass for the whole.
"""

from __future__ import annotations

import filecmp
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loguru import logger

from lmms_plugin.tasks.sources.images import DatasetError, content
from lmms_plugin.utils import variables

if TYPE_CHECKING:
    import datasets

_SHARD = re.compile(r"(?P<before>.+[-_])(?P<number>\d+)(?P<between>[-_]of[-_])(?P<count>\d+)(?!\d)(?P<after>.*)")
# `datasets` used to end names in a digest, which no other shard tells.
_DIGEST = re.compile(r"^-[0-9a-f]{8,}(?=\.)")
_REMEDY = "keep one copy of the split in the folder"
_SHOWN = 4
# A benchmark may itself hold a few rows twice.
_MOST_REPEATED = 0.05


class AbsentSplitError(DatasetError):
    """A local copy that holds no file of a split."""


def local_folder(variable: str, hint: str) -> Path | None:
    """The folder that a variable names; None where it names none.

    Args:
        variable: its name.
        hint: what the folder is to hold, for messages to the user.

    Raises:
        DatasetError: there is no such folder, or a file in its place.
    """
    try:
        folder = variables.folder(variable)
    except ValueError as error:
        raise DatasetError(f"{error}. {hint}") from error
    if folder is None or folder.is_dir():
        return folder
    if folder.exists():
        raise DatasetError(f"{variable}={folder}: expected a folder, got a file; name the folder it lies in. {hint}")
    raise DatasetError(f"{variable}={folder}: there is no such folder. {hint}")


def files_of(files: Sequence[Path], split: str) -> list[str]:
    """The files of a split: those whose name is the split's, or starts with it and `-`, `_` or `.`.

    Raises:
        DatasetError: they hold the split twice or a part of it, as far as files tell, or one is no parquet file; names
            them.
    """
    own = [file for file in files if file.name.startswith((f"{split}.", f"{split}-", f"{split}_"))]
    expect_one_copy(own)
    expect_all_shards(own)
    for file in own:
        _expect_parquet(file)
    return [str(file) for file in own]


def expect_one_copy(files: Iterable[Path]) -> None:
    """Refuse files that are several copies of one split: equal files, or shards of more than one set.

    Raises:
        DatasetError: names two files.
    """
    files = list(files)
    sizes: defaultdict[int, list[Path]] = defaultdict(list)
    for file in files:
        sizes[file.stat().st_size].append(file)
    for shards in _sets(files):
        for shard, other in combinations(shards, 2):
            if shard.total != other.total or shard.number == other.number:
                raise DatasetError(
                    f"expected the shards of one copy of a split, got two: {shard.file} and {other.file}; {_REMEDY}"
                )
    for alike in sizes.values():
        for file, same in combinations(alike, 2):
            if filecmp.cmp(file, same, shallow=False):
                raise DatasetError(f"expected every row once, but {file} and {same} are the same; {_REMEDY}")


def expect_all_shards(files: Iterable[Path]) -> None:
    """Refuse files that are some of the shards of one copy of a split, as `-of-00002` in their names tells.

    Raises:
        DatasetError: names those that are missing.
    """
    for shards in _sets(files):
        first = shards[0]
        numbers = {shard.number for shard in shards}
        # Most count from 0; the last of those that count from 1 has the number of all.
        start = int(first.total in numbers)
        expected = range(start, start + first.total)
        absent = list(islice((number for number in expected if number not in numbers), _SHOWN + 1))
        if absent:
            names = ", ".join(map(first.sibling, absent[:_SHOWN])) + (", ..." if absent[_SHOWN:] else "")
            raise DatasetError(
                f"{first.file.parent}: expected all {first.total} shards of {first.stem!r}, got {len(numbers)}: "
                f"{names} {'are' if absent[1:] else 'is'} missing; fetch what is missing, or remove the rest"
            )
        for shard in shards:
            if shard.number not in expected:
                raise DatasetError(f"{shard.file}: expected a number below {shard.total} in its name; remove it")


class _Shard(NamedTuple):
    file: Path
    parts: re.Match[str]

    @property
    def number(self) -> int:
        return int(self.parts["number"])

    @property
    def total(self) -> int:
        return int(self.parts["count"])

    @property
    def stem(self) -> str:
        return self.parts["before"][:-1]

    def sibling(self, number: int) -> str:
        """The name of another shard of the set."""
        parts = self.parts
        own = str(number).zfill(len(parts["number"]))
        return f"{parts['before']}{own}{parts['between']}{parts['count']}{_DIGEST.sub('-*', parts['after'])}"


def _sets(files: Iterable[Path]) -> list[list[_Shard]]:
    sets: defaultdict[str, list[_Shard]] = defaultdict(list)
    for file in files:
        if parts := _SHARD.match(file.name):
            shard = _Shard(file, parts)
            sets[shard.stem].append(shard)
    return list(sets.values())


def _expect_parquet(file: Path) -> None:
    # Listing tasks must not wait for the library.
    from pyarrow import ArrowException, parquet

    try:
        parquet.read_metadata(file)
    except (ArrowException, OSError) as error:
        raise DatasetError(f"{file}: expected a whole parquet file: {error}; fetch it again") from error


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
            f"({len(again)} repeated of {len(again) + len(seen)} rows); {_REMEDY}"
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
        raise DatasetError(f"{message}; {_REMEDY}")
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
