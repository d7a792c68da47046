"""Local copies of datasets: the files of a split, checked to hold all of it exactly once.

A split held twice (an older snapshot beside a newer one, a backup) would be asked twice, and intervals would shrink by
√2 without new data. A part of a split would pass for the whole.
"""

from __future__ import annotations

import filecmp
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

from lmms_plugin.utils import variables

_SHARD = re.compile(r"(?P<before>.+[-_])(?P<number>\d+)(?P<between>[-_]of[-_])(?P<count>\d+)(?!\d)(?P<after>.*)")
# `datasets` used to append a digest to names, from which other shards cannot be derived.
_DIGEST = re.compile(r"^-[0-9a-f]{8,}(?=\.)")
REMEDY = "keep one copy of the split in the folder"
_SHOWN = 4


class DatasetError(ValueError):
    """A dataset that is unreachable, or whose columns or values differ from what the task documents."""


class AbsentSplitError(DatasetError):
    """A local copy without any file of a split."""


def local_folder(variable: str, hint: str) -> Path | None:
    """Return the folder that an environment variable names; None if it is not set.

    Args:
        variable: Name of the variable.
        hint: Content that the folder should have, for messages to the user.

    Raises:
        DatasetError: The folder does not exist, or is a file.
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
    """Return the files of a split: those whose name is the split's, or starts with it and `-`, `_` or `.`.

    Raises:
        DatasetError: The files hold the split twice or in part, as far as they show, or one is not a parquet file;
            names them.
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
        DatasetError: There are several copies; names two files.
    """
    files = list(files)
    sizes: defaultdict[int, list[Path]] = defaultdict(list)
    for file in files:
        sizes[file.stat().st_size].append(file)
    for shards in _sets(files):
        for shard, other in combinations(shards, 2):
            if shard.total != other.total or shard.number == other.number:
                raise DatasetError(
                    f"expected the shards of one copy of a split, got two: {shard.file} and {other.file}; {REMEDY}"
                )
    for alike in sizes.values():
        for file, same in combinations(alike, 2):
            if filecmp.cmp(file, same, shallow=False):
                raise DatasetError(f"expected every row once, but {file} and {same} are the same; {REMEDY}")


def expect_all_shards(files: Iterable[Path]) -> None:
    """Refuse an incomplete set of shards, as `-of-00002` in their names shows.

    Raises:
        DatasetError: Shards are missing; names them.
    """
    for shards in _sets(files):
        first = shards[0]
        numbers = {shard.number for shard in shards}
        # Most sets count from 0; in one that counts from 1 the last number equals the total.
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
        """Return the name of another shard of the set."""
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
    # Imported late: listing tasks must not wait for the library.
    from pyarrow import ArrowException, parquet

    try:
        parquet.read_metadata(file)
    except (ArrowException, OSError) as error:
        raise DatasetError(f"{file}: expected a whole parquet file: {error}; fetch it again") from error
