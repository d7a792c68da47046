"""Writing of local copies: rows with images as parquet, a few at a time."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.files import replacing

_ROWS_AT_ONCE = 500
_UNFIT = (pa.ArrowException, OverflowError, TypeError, ValueError)


def write(rows: Iterable[Mapping[str, Any]], features: datasets.Features, out: Path) -> int:
    """Write rows, whose images are `{"bytes": ..., "path": ...}`, and return their number.

    The file appears when it is complete.

    Raises:
        DatasetError: A row holds something of another type than its column; row and column are named.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    count, ordered, schema = 0, iter(rows), features.arrow_schema
    # Dictionary encoding stores the photograph of several rows once per page.
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 25}
    with replacing(out) as unfinished, pq.ParquetWriter(unfinished, schema, **options) as writer:
        while some := list(islice(ordered, _ROWS_AT_ONCE)):
            try:
                table = pa.Table.from_pylist(some, schema=schema)
            except _UNFIT:
                _expect_fit(some, schema, count)
                raise
            writer.write_table(table)
            count += len(some)
    return count


def _expect_fit(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, before: int) -> None:
    for number, row in enumerate(rows, start=before):
        for column in schema:
            try:
                pa.array([row[column.name]], column.type)
            except _UNFIT as error:
                value = str(row[column.name])[:80]
                raise DatasetError(f"row {number}: {column.name}: expected {column.type}, got {value}") from error
