"""Checks of local copies of datasets that environment variables name, by the tasks' own loaders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import datasets
import pyarrow as pa
from pyarrow import parquet

from lmms_plugin.doctor.rows import DiagnosisRow, fail, ok, warn
from lmms_plugin.tasks.captions import captioning
from lmms_plugin.tasks.grounding import natural, refcocoplus, reviewed, strata
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.sources.documents import Documents
from lmms_plugin.tasks.sources.origins import DatasetOrigin
from lmms_plugin.tasks.vqa import datasets as vqa_sources
from lmms_plugin.tasks.vqa.questions import PARTS, Parts
from lmms_plugin.utils import image_slices, suggest, variables
from lmms_plugin.utils.copies import AbsentSplitError, DatasetError

WHOLE = 8 << 30
"""Bytes of files up to which all rows are read, if the temporary folder has room; of larger files a sample is read."""

DECODED = 16
"""Documents of each split whose image is decoded: the first, the last, and others spread between them."""

_ROW_GROUPS, ROWS = 16, 16


class LocalSplit(NamedTuple):
    """Data of one variable for one task or split.

    Attributes:
        name: Name of the split.
        files: Function that finds its files.
        check: Function that reads the files and returns what was read.

    Both functions raise `DatasetError`.
    """

    name: str
    files: Callable[[], Sequence[str]]
    check: Callable[[Sequence[str]], str]


def check_copies() -> Iterator[DiagnosisRow]:
    """Open every local copy that the environment names, and report variables that nothing reads."""
    parts = known()
    yield from _sliced()
    given = {name: value for name, value in sorted(os.environ.items()) if name.startswith(variables.PREFIX) and value}
    for name, value in given.items():
        if name in parts:
            yield _checked(name, value, parts[name])
        elif name not in variables.OF_NO_DATASET:
            meant = suggest.nearest(name, [*parts, *sorted(variables.OF_NO_DATASET)])
            yield warn(
                "local copies",
                f"{name} is no variable of this package",
                (f"did you mean {meant}? " if meant else "")
                + "A dataset that you added yourself may read it (docs/adding_a_dataset.md)",
            )
    if not given.keys() & parts.keys():
        yield ok("local copies", "no variable names one; datasets come from the hub")


def _sliced() -> Iterator[DiagnosisRow]:
    """Report that grounding tasks ask about a part of the images."""
    try:
        part = image_slices.asked()
    except ValueError as error:
        yield fail("local copies", str(error), f"unset {variables.IMAGES}")
        return
    if part is not None:
        yield warn(
            "local copies",
            f"{variables.IMAGES}={part}: grounding tasks ask about {part.stop - part.start} images at most",
            f"unset {variables.IMAGES} to ask about all",
        )


def known() -> dict[str, list[LocalSplit]]:
    """Return every variable that names a local copy, as the datasets declare them, with its splits."""
    tables: list[tuple[DatasetOrigin, Callable[[datasets.Dataset], Documents]]] = [
        *((one, one) for one in natural.SETS.values()),
        *((one, one) for one in captioning.SETS.values()),
        *((one, one) for one in matching.SETS.values()),
        *((one, Parts(one.name, tuple(PARTS))) for one in vqa_sources.SOURCES.values()),
    ]
    tables.sort(key=lambda pair: pair[0].variable)
    found = {
        name: [LocalSplit(origin.split, _files(origin), _reading(origin.split, make)) for origin, make in pairs]
        for name, pairs in groupby(tables, key=lambda pair: pair[0].variable)
    }
    found[refcocoplus.VARIABLE] = [
        LocalSplit(split, _refcocoplus(split), _reading(split, ExpressionDocs)) for split in refcocoplus.SPLITS
    ]
    found[reviewed.VARIABLE] = [
        LocalSplit(split, _review(split), lambda files: str(len(reviewed.Review(Path(files[0])))) + " reviews")
        for split in refcocoplus.SPLITS
    ]
    found[strata.VARIABLE] = [
        LocalSplit("train2014", _instances, lambda files: f"objects of {len(strata.Instances(Path(files[0])))} images")
    ]
    return found


def _instances() -> list[str]:
    return [str(strata.file())]


def _checked(name: str, value: str, parts: Iterable[LocalSplit]) -> DiagnosisRow:
    place, read, absent = f"{name}={value}", [], []
    for part in parts:
        try:
            files = part.files()
        except AbsentSplitError as error:
            absent.append((part.name, str(error)))
            continue
        except DatasetError as error:
            said = str(error).removeprefix(f"{place}: ")
            return fail("local copies", f"{place}: {said}", "correct the copy, or unset the variable")
        try:
            read.append(f"{part.name}: {part.check(files)}")
        except (ValueError, OSError, pa.ArrowException) as error:
            said = str(error).removeprefix(f"{place}: ").removeprefix(f"{part.name}: ")
            return fail("local copies", f"{place}: {part.name}: {said}", "correct the copy, or unset the variable")
    if not read:
        return fail("local copies", absent[0][1], "correct the folder, or unset the variable")
    # Tasks may share a split.
    said = "; ".join(dict.fromkeys(read))
    without = ", ".join(dict.fromkeys(name for name, _ in absent))
    if without:
        return warn("local copies", f"{place}: {said}; there is no {without}", f"tasks on {without} cannot run")
    return ok("local copies", f"{place}: {said}")


def _files(origin: DatasetOrigin) -> Callable[[], Sequence[str]]:
    def files() -> Sequence[str]:
        _, arguments = origin.load_arguments()
        named: Sequence[str] = arguments["data_files"][origin.split]
        return named

    return files


def _refcocoplus(split: str) -> Callable[[], Sequence[str]]:
    def files() -> Sequence[str]:
        found = refcocoplus.local_files()
        if split not in found:
            raise AbsentSplitError(f"{refcocoplus.source()}: there is no split {split}")
        return found[split]

    return files


def _review(split: str) -> Callable[[], Sequence[str]]:
    return lambda: [str(reviewed.Reviewed(split).file())]


def _reading(split: str, make: Callable[[datasets.Dataset], Documents]) -> Callable[[Sequence[str]], str]:
    def read(files: Sequence[str]) -> str:
        with opened(files, split) as (rows, total):
            docs = make(rows)
            # The fields that a run reads of every document before the first answer.
            for number in range(len(docs)):
                docs.content(number)
            decoded = spread(len(docs), DECODED)
            for number in decoded:
                docs.image(number)
            whole = f"{total} rows" if len(rows) == total else f"{len(rows)} of {total} rows looked at"
            return f"{whole}, images of {len(decoded)} documents decoded"

    return read


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers below `count`: the first, the last and others evenly between them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


@contextmanager
def opened(files: Sequence[str], split: str) -> Iterator[tuple[datasets.Dataset, int]]:
    """Read parquet files as `datasets` does, but without leaving anything in its cache.

    Args:
        files: Files of one split.
        split: Name of the split.

    Yields:
        All rows, or a spread sample where files exceed `WHOLE` bytes or the free space; and the total number of rows.

    Raises:
        DatasetError: There are no rows, a file is damaged, or files differ in their columns.
    """
    stored = [_Stored(file) for file in files]
    total = sum(one.parquet.metadata.num_rows for one in stored)
    if not total:
        raise DatasetError(f"{files[0]}: there are no rows")
    groups = [(one, number) for one in stored for number in range(one.parquet.num_row_groups)]
    features = datasets.Features.from_arrow_schema(stored[0].parquet.schema_arrow)
    with TemporaryDirectory() as folder:
        size = sum(os.path.getsize(file) for file in files)
        if size <= min(WHOLE, shutil.disk_usage(folder).free // 2):
            tables = (one.group(number) for one, number in groups)
        else:
            tables = (_some(one.group(number)) for one, number in groups[:: max(1, len(groups) // _ROW_GROUPS)])
        # Memory-mapped, so that a large copy takes no memory.
        file = Path(folder) / "rows.arrow"
        with pa.ipc.new_stream(file, features.arrow_schema) as writer:
            for table in tables:
                writer.write_table(_cast(table, features, Path(files[0]).parent))
        info = datasets.DatasetInfo(features=features)
        yield datasets.Dataset.from_file(str(file), info=info, split=datasets.NamedSplit(split)), total


class _Stored:
    """A parquet file that names itself in errors about damage."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.parquet = parquet.ParquetFile(file)

    def group(self, number: int) -> pa.Table:
        try:
            return self.parquet.read_row_group(number)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{self.file}: row group {number} cannot be read: {error}; fetch it again") from error


def _cast(table: pa.Table, features: datasets.Features, folder: Path) -> pa.Table:
    try:
        return table.select(features.arrow_schema.names).cast(features.arrow_schema)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise DatasetError(f"{folder}: files differ in their columns: {error}") from error


def _some(table: pa.Table) -> pa.Table:
    return table.take(spread(table.num_rows, ROWS))
