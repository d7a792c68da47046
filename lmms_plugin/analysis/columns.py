"""Fast reader of logs of samples into columns, without parsing the rest of their rows.

A row of a log holds prompt, answer, probabilities and one copy of the confidence per metric; only one object in the
middle is needed. It is cut out of the line, and pyarrow parses nothing else, which takes a twentieth of the time of
parsing rows. Any log that is not exactly as lmms-eval and our tasks write it is left to `lmms_plugin.analysis.logs`,
which parses row by row and reports errors.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from lmms_plugin.analysis.records import (
    GROUNDING,
    KINDS,
    REJECTION,
    VQA,
    Floats,
    TaskKind,
    TaskRecords,
    coded,
    is_record,
    place_of,
)

_ROWS_AT_ONCE = 20_000
_NUMBER = b'{"doc_id": '
"""Beginning of a row, as lmms-eval writes it."""

Wanted = Callable[[TaskKind], Collection[str]]
"""Kind of task → estimators to read."""


class UnusualLogError(ValueError):
    """A log that only the row-by-row parser can judge."""


def read(task: str, config: Mapping[str, Any], log: Path, wanted: Wanted | None) -> TaskRecords:
    """Read the answers of one task of a run.

    Args:
        task: Name of the task.
        config: Configuration of the task in the results file.
        log: Log of samples.
        wanted: Estimators to read; None for all.

    Raises:
        UnusualLogError: The log is not exactly as our tasks write it.
    """
    if not log.exists():
        raise UnusualLogError(f"no log {log}")
    with log.open("rb", buffering=1 << 20) as lines:
        first = _first(lines.readline(), log)
        kind = next((kind for kind in KINDS if is_record(first.get(kind.record), kind)), None)
        if kind is None or kind is REJECTION:
            raise UnusualLogError(f"{log}: no right or wrong answers")
        told = first[kind.record].get("confidence")
        names = sorted(told) if isinstance(told, dict) else []
        if wanted is not None and names:
            names = sorted(set(wanted(kind)))
            if missing := set(names) - set(told):
                raise UnusualLogError(f"{log}: no estimator {missing}")
        lines.seek(0)
        table, numbers = _table(lines, kind, first, _schema(kind, first[kind.record], names), log, wanted is not None)
    order = pc.sort_indices(table["id"])
    return _records(task, config, kind, table.take(order).combine_chunks(), numbers[order.to_numpy()], log)


def _first(line: bytes, log: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UnusualLogError(f"{log}: {error}") from error
    if not isinstance(row, dict):
        raise UnusualLogError(f"{log}: no JSON object")
    return row


def _schema(kind: TaskKind, record: Mapping[str, Any], estimators: Sequence[str]) -> pa.Schema:
    number, text = pa.float64(), pa.string()
    fields = {"id": text, "image": text, kind.score: number}
    if kind is GROUNDING:
        fields |= {"expression": text, "target": pa.list_(number), "box": pa.list_(number), "stratum": text}
    if kind is VQA:
        truths = record.get("answers")
        fields |= {"question": text, "answers": pa.list_(text) if isinstance(truths, list) else text, "part": text}
        fields |= {"unfinished": pa.bool_()}
    if estimators:
        fields["confidence"] = pa.struct([(name, number) for name in estimators])
    return pa.schema(list(fields.items()))


def _table(
    lines: Iterator[bytes], kind: TaskKind, first: Mapping[str, Any], schema: pa.Schema, log: Path, some: bool
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Return the records of all lines and their document numbers.

    A record is cut out between the key before it and the key that follows it in the first row.
    """
    keys = list(first)
    place = keys.index(kind.record)
    if place + 1 == len(keys) or keys[0] != "doc_id":
        raise UnusualLogError(f"{log}: the record ends the row, or its number does not begin it")
    # Every quotation mark inside a JSON string is escaped, so these bytes occur only as keys.
    start = f'"{kind.record}": {{'.encode()
    stop = f'}}, "{keys[place + 1]}": '.encode()
    skip = len(start) - 1
    estimators = [field.name for field in schema.field("confidence").type] if "confidence" in schema.names else []
    # All estimators are read, whatever the first row holds.
    wanted = [f'"{name}": '.encode() for name in estimators] if some else []
    told = bool(estimators)
    tables, found, numbers = [], [], []
    for line in lines:
        begin = line.find(start)
        end = line.find(stop, begin)
        if begin < 0 or end < 0 or not line.startswith(_NUMBER) or line[-2:] != b"}\n":
            raise UnusualLogError(f"{log}: a row without {kind.record}")
        record = line[begin + skip : end + 1]
        # Some rows have confidences and others do not: no row may be dropped silently.
        if told != (_CONFIDENCE in record) or _NOTHING in record:
            raise UnusualLogError(f"{log}: answers with and without confidence")
        numbers.append(int(line[len(_NUMBER) : line.index(b",", len(_NUMBER))]))
        found.append(_some_confidences(record, wanted) if wanted else record)
        if len(found) == _ROWS_AT_ONCE:
            tables.append(_parsed(found, schema, log, some))
            found = []
    if found:
        tables.append(_parsed(found, schema, log, some))
    table = pa.concat_tables(tables)
    needed = ["id", "image", kind.score, *(name for name in ("expression",) if name in table.column_names)]
    if any(table[name].null_count for name in needed):
        raise UnusualLogError(f"{log}: missing values")
    if pc.count_distinct(table["id"]).as_py() != table.num_rows:
        raise UnusualLogError(f"{log}: a document twice")
    return table, np.array(numbers, np.int64)


_CONFIDENCE = b'"confidence": {'
_NOTHING = b'"confidence": {}'


def _some_confidences(record: bytes, keys: Sequence[bytes]) -> bytes:
    """Return a record with only the wanted confidences, which halves what is parsed; unchanged if one is missing."""
    start = record.find(_CONFIDENCE)
    end = record.find(b"}", start)
    kept = []
    for key in keys:
        wanted = record.find(key, start, end)
        if wanted < 0:
            return record
        comma = record.find(b",", wanted, end)
        kept.append(record[wanted : comma if comma > 0 else end])
    return record[: start + len(_CONFIDENCE)] + b", ".join(kept) + record[end:]


def _parsed(found: Sequence[bytes], schema: pa.Schema, log: Path, some: bool) -> pa.Table:
    joined = b"\n".join(found)
    try:
        table = pj.read_json(
            pa.BufferReader(joined),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(joined) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore" if some else "infer"
            ),
        )
    except pa.ArrowInvalid as error:
        raise UnusualLogError(f"{log}: {error}") from error
    if table.num_rows != len(found):
        raise UnusualLogError(f"{log}: {table.num_rows} records in {len(found)} rows")
    known = [name for name in table.column_names if name in schema.names]
    if not some and "confidence" in known and table.schema.field("confidence").type != schema.field("confidence").type:
        raise UnusualLogError(f"{log}: estimators that the first row lacks")
    return table.select(known)


def _records(
    task: str, config: Mapping[str, Any], kind: TaskKind, table: pa.Table, numbers: npt.NDArray[np.int64], log: Path
) -> TaskRecords:
    size = table.num_rows
    parsed = np.ones(size, np.bool_)
    if kind is GROUNDING:
        parsed = table["box"].is_valid().to_numpy()
    elif kind is VQA:
        parsed = ~pc.fill_null(table["unfinished"], False).to_numpy()
    question, truth = ("expression", "target") if kind is GROUNDING else ("question", "answers")
    index, names = _coded(table["image"])
    return TaskRecords(
        task,
        kind,
        place_of(config),
        _texts(table["id"]),
        numbers,
        index,
        names,
        _whole(table[question]),
        _whole(table[truth]),
        _texts(pc.fill_null(table["part"], "")) if "part" in table.column_names else np.full(size, "", np.str_),
        _fractions(table[kind.score], log),
        np.asarray(parsed, np.bool_),
        _confidence(table, log),
        strata=_strata(table),
    )


def _strata(table: pa.Table) -> npt.NDArray[np.str_] | None:
    if "stratum" not in table.column_names or table["stratum"].null_count == table.num_rows:
        return None
    return _texts(pc.fill_null(table["stratum"], ""))


def _confidence(table: pa.Table, log: Path) -> dict[str, Floats]:
    if "confidence" not in table.column_names:
        return {}
    told = _whole(table["confidence"])
    return {field.name: _fractions(told.field(field.name), log) for field in told.type}


def _fractions(column: pa.ChunkedArray | pa.Array, log: Path) -> Floats:
    """Return numbers in [0, 1], NaN for null."""
    values = _whole(column).to_numpy(zero_copy_only=False)
    array: Floats = np.asarray(values, np.float64)
    bad = ~((array >= 0.0) & (array <= 1.0))
    if np.count_nonzero(bad) != column.null_count:
        raise UnusualLogError(f"{log}: a value outside [0, 1]")
    return array


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _texts(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.str_]:
    return np.array(column.to_pylist(), np.str_)


def _coded(images: pa.ChunkedArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.str_]]:
    """Encode texts as `lmms_plugin.analysis.records.coded` does, comparing each distinct text once."""
    encoded = _whole(images).dictionary_encode()
    rank, names = coded(_texts(encoded.dictionary))
    return rank[encoded.indices.to_numpy()], names
