"""Writing of local copies: rows with images as parquet, a few at a time."""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

_ROWS_AT_ONCE = 500


def write(rows: Iterable[Mapping[str, Any]], features: datasets.Features, out: Path) -> int:
    """Write rows, whose images are `{"bytes": ..., "path": ...}`, and return their number."""
    out.parent.mkdir(parents=True, exist_ok=True)
    count, ordered, schema = 0, iter(rows), features.arrow_schema
    # Dictionary encoding stores the photograph of several rows once per page.
    with pq.ParquetWriter(out, schema, compression="zstd", dictionary_pagesize_limit=1 << 25) as writer:
        while some := list(islice(ordered, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count
