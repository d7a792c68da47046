"""Local copies of datasets: which files are a split, and that they hold it once.

A split held twice (an older snapshot beside a newer one, a backup) would be asked twice, and intervals would shrink by
√2 although nothing new was seen.
"""

import filecmp
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path


class DatasetError(ValueError):
    """A dataset that cannot be reached, or whose columns or values are not what the task documents."""


_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\b")
_REMEDY = "keep one copy of the split in the folder"


def files_of(files: Sequence[Path], split: str) -> list[str]:
    """The files of a split: those whose name is the split's, or starts with it and `-`, `_` or `.`.

    Raises:
        DatasetError: they hold the split twice, as far as files tell; names them.
    """
    own = [file for file in files if file.name.startswith((f"{split}.", f"{split}-", f"{split}_"))]
    expect_one_copy(own)
    return [str(file) for file in own]


def expect_one_copy(files: Iterable[Path]) -> None:
    """Refuse files that are several copies of one split: equal files, or shards of more than one set.

    Raises:
        DatasetError: names two files.
    """
    files = list(files)
    sets: defaultdict[str, list[tuple[str, str, Path]]] = defaultdict(list)
    sizes: defaultdict[int, list[Path]] = defaultdict(list)
    for file in files:
        sizes[file.stat().st_size].append(file)
        if shard := _SHARD.match(file.name):
            sets[shard["stem"]].append((shard["number"], shard["count"], file))
    for shards in sets.values():
        for (number, count, file), (other_number, other_count, other) in combinations(shards, 2):
            if count != other_count or number == other_number:
                raise DatasetError(
                    f"expected the shards of one copy of a split, got two: {file} and {other}; {_REMEDY}"
                )
    for alike in sizes.values():
        for file, other in combinations(alike, 2):
            if filecmp.cmp(file, other, shallow=False):
                raise DatasetError(f"expected every row once, but {file} and {other} are the same; {_REMEDY}")


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
