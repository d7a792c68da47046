"""Local copies of datasets that environment variables name: opened, and checked by the tasks' own loaders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from pyarrow import parquet

from lmms_plugin.doctor.rows import Row, fail, ok, warn
from lmms_plugin.tasks.captions import captioning
from lmms_plugin.tasks.grounding import natural, refcocoplus, reviewed
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.sources.images import DatasetError
from lmms_plugin.tasks.sources.origins import Origin
from lmms_plugin.tasks.vqa import datasets as vqa_sources
from lmms_plugin.tasks.vqa.questions import Questions
from lmms_plugin.utils import suggest, variables

WHOLE = 512 << 20
"""Bytes of files up to which all rows are read; of larger copies a sample."""

_ROW_GROUPS, _ROWS = 16, 16


class Part(NamedTuple):
    """What one variable holds for one task or split.

    Attributes:
        name: Of the split.
        files: Finds its files.
        check: Reads them and says what was read.

    Both raise `DatasetError`.
    """

    name: str
    files: Callable[[], Sequence[str]]
    check: Callable[[Sequence[str]], str]


def check_copies() -> Iterator[Row]:
    """Open every local copy that the environment names, and say which variables nobody reads."""
    parts = known()
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith(variables.PREFIX) and value}
    for name, value in given.items():
        if name in parts:
            yield _checked(name, value, parts[name])
        elif name != variables.CACHE:
            meant = suggest.nearest(name, [*parts, variables.CACHE])
            yield warn(
                "local copies",
                f"{name} is no variable of this package",
                (f"did you mean {meant}? " if meant else "")
                + "A dataset that you added yourself may read it (docs/adding_a_dataset.md)",
            )
    if not given.keys() & parts.keys():
        yield ok("local copies", "no variable names one; datasets come from the hub")


def known() -> dict[str, list[Part]]:
    """Return every variable that names a local copy, as the datasets' own declarations have it, with its parts."""
    tables: list[tuple[Origin, Callable[[datasets.Dataset], object]]] = [
        *((one, one) for one in natural.SETS.values()),
        *((one, one) for one in captioning.SETS.values()),
        *((one, one) for one in matching.SETS.values()),
        *((one, _questions(one)) for one in vqa_sources.SOURCES.values()),
    ]
    tables.sort(key=lambda pair: pair[0].variable)
    found = {
        name: [Part(origin.split, _files(origin), _reading(make)) for origin, make in pairs]
        for name, pairs in groupby(tables, key=lambda pair: pair[0].variable)
    }
    found[refcocoplus.VARIABLE] = [
        Part(split, _refcocoplus(split), _reading(ExpressionDocs)) for split in refcocoplus.SPLITS
    ]
    found[reviewed.VARIABLE] = [
        Part(split, _review(split), lambda files: str(len(reviewed.Review(Path(files[0])))) + " reviews")
        for split in refcocoplus.SPLITS
    ]
    return found


def _checked(name: str, value: str, parts: Iterable[Part]) -> Row:
    place, read, absent = f"{name}={value}", [], []
    for part in parts:
        try:
            files = part.files()
        except DatasetError as error:
            absent.append((part.name, str(error)))
            continue
        try:
            read.append(f"{part.name}: {part.check(files)}")
        except (ValueError, OSError, pa.ArrowException) as error:
            said = str(error).removeprefix(f"{place}: ")
            return fail("local copies", f"{place}: {part.name}: {said}", "correct the copy, or unset the variable")
    if not read:
        return fail("local copies", absent[0][1], "correct the folder, or unset the variable")
    # Tasks may share a split.
    said = "; ".join(dict.fromkeys(read))
    without = ", ".join(dict.fromkeys(name for name, _ in absent))
    if without:
        return warn("local copies", f"{place}: {said}; there is no {without}", f"tasks on {without} cannot run")
    return ok("local copies", f"{place}: {said}")


def _files(origin: Origin) -> Callable[[], Sequence[str]]:
    def files() -> Sequence[str]:
        _, arguments = origin.load_arguments()
        named: Sequence[str] = arguments["data_files"][origin.split]
        return named

    return files


def _refcocoplus(split: str) -> Callable[[], Sequence[str]]:
    def files() -> Sequence[str]:
        folder = Path(os.environ[refcocoplus.VARIABLE])
        found = refcocoplus.local_files(folder)
        if split not in found:
            raise DatasetError(f"{refcocoplus.VARIABLE}={folder}: there is no split {split}")
        return found[split]

    return files


def _review(split: str) -> Callable[[], Sequence[str]]:
    return lambda: [str(reviewed.Reviewed(split).file())]


def _questions(source: vqa_sources.Source) -> Callable[[datasets.Dataset], object]:
    return lambda rows: Questions(source, rows)


def _reading(make: Callable[[datasets.Dataset], object]) -> Callable[[Sequence[str]], str]:
    def read(files: Sequence[str]) -> str:
        rows, total = sampled(files)
        make(rows)
        return f"{total} rows" if len(rows) == total else f"{len(rows)} of {total} rows looked at"

    return read


def sampled(files: Sequence[str]) -> tuple[datasets.Dataset, int]:
    """Read parquet files as `datasets` does, but into memory and without leaving anything in its cache.

    Args:
        files: Of one split.

    Returns:
        All rows, or of files above `WHOLE` bytes some from all over them; and how many rows there are.

    Raises:
        DatasetError: There are no rows, or files differ in their columns.
    """
    opened = [parquet.ParquetFile(file) for file in files]
    groups = [(file, number) for file in opened for number in range(file.num_row_groups)]
    total = sum(file.metadata.num_rows for file in opened)
    if not total:
        raise DatasetError(f"{files[0]}: there are no rows")
    if sum(os.path.getsize(file) for file in files) <= WHOLE:
        tables = [file.read_row_group(number) for file, number in groups]
    else:
        chosen = groups[:: max(1, len(groups) // _ROW_GROUPS)]
        tables = [_spread(file.read_row_group(number)) for file, number in chosen]
    features = datasets.Features.from_arrow_schema(opened[0].schema_arrow)
    try:
        table = pa.concat_tables(tables).cast(features.arrow_schema)
    except (pa.ArrowException, ValueError) as error:
        raise DatasetError(f"{Path(files[0]).parent}: files differ in their columns: {error}") from error
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features)), total


def _spread(table: Any) -> Any:
    return table.take(list(range(0, table.num_rows, max(1, table.num_rows // _ROWS)))[:_ROWS])
