"""Fast reader of logs of samples into columns, without parsing the rest of their rows.

A row of a log holds prompt, answer, probabilities and one copy of the confidence per metric; only one object in the
middle is needed. It is cut out of the line, and msgspec parses of it what is used and nothing else, which takes a
thirtieth of the time of parsing rows. Any log that is not exactly as lmms-eval and our tasks write it is left to
`lmms_plugin.analysis.logs`, which parses row by row and reports errors.
"""

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lmms_plugin.analysis.records import (
    GROUNDING,
    KINDS,
    REJECTION,
    VQA,
    Floats,
    TaskKind,
    TaskRecords,
    coded,
    fingerprint,
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
        table, numbers = _table(lines, kind, first, names, log, wanted is not None)
    return _records(task, config, kind, table, numbers, log)


def _first(line: bytes, log: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UnusualLogError(f"{log}: {error}") from error
    if not isinstance(row, dict):
        raise UnusualLogError(f"{log}: no JSON object")
    return row


class _Parts(NamedTuple):
    """What is parsed of the records of a log.

    Attributes:
        decoder: Parser of one record.
        schema: Columns that are made of its fields; that of `confidence` has a field for each estimator.
    """

    decoder: msgspec.json.Decoder[Any]
    schema: pa.Schema


@lru_cache(maxsize=32)
def _parts(kind: TaskKind, estimators: tuple[str, ...], *, listed: bool, some: bool) -> _Parts:
    """Return the fields that are needed of records.

    Args:
        kind: Kind of the records.
        estimators: Estimators of confidence in the first record, or those wanted; empty for none.
        listed: Whether the first record has a list of true answers, not one text.
        some: Whether other estimators are passed over; else they are an error.
    """
    number, text = pa.float64(), pa.string()
    types: dict[str, Any] = {"id": str, "image": str, kind.score: float}
    fields = {"id": text, "image": text, kind.score: number}
    if kind is GROUNDING:
        types |= {"expression": str, "target": list[float], "box": list[float] | None, "stratum": str | None}
        fields |= {"expression": text, "target": pa.list_(number), "box": pa.list_(number), "stratum": text}
    if kind is VQA:
        types |= {"question": str | None, "answers": list[str] | None if listed else str | None}
        types |= {"part": str | None, "unfinished": bool}
        fields |= {"question": text, "answers": pa.list_(text) if listed else text, "part": text}
        fields |= {"unfinished": pa.bool_()}
    # Some rows have confidences and others do not: no row may be dropped silently.
    types["confidence"] = None
    if estimators:
        told = [(name, float | None, None) for name in estimators]
        types["confidence"] = msgspec.defstruct("Confidence", told, forbid_unknown_fields=not some, gc=False)
        fields["confidence"] = pa.struct([(name, number) for name in estimators])
    left_out = {"stratum": None, "question": None, "answers": None, "part": None, "unfinished": False}
    left_out |= {} if estimators else {"confidence": None}
    struct = msgspec.defstruct(
        "Record",
        [(name, kind_of, left_out[name]) if name in left_out else (name, kind_of) for name, kind_of in types.items()],
        kw_only=True,
        gc=False,
    )
    return _Parts(msgspec.json.Decoder(struct), pa.schema(list(fields.items())))


def _table(
    lines: Iterator[bytes],
    kind: TaskKind,
    first: Mapping[str, Any],
    estimators: Sequence[str],
    log: Path,
    some: bool,
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
    listed = isinstance(first[kind.record].get("answers"), list)
    decoder, schema = _parts(kind, tuple(estimators), listed=listed, some=some)
    tables, found, numbers = [], list[Any](), list[int]()
    try:
        for line in lines:
            begin = line.find(start)
            end = line.find(stop, begin) + 1
            if begin < 0 or end < 1 or not line.startswith(_NUMBER) or line[-2:] != b"}\n":
                raise UnusualLogError(f"{log}: a row without {kind.record}")
            if line.find(_NO_CONFIDENCE, begin, end) >= 0:
                raise UnusualLogError(f"{log}: answers with and without confidence")
            numbers.append(int(line[len(_NUMBER) : line.index(b",", len(_NUMBER))]))
            found.append(decoder.decode(line[begin + skip : end]))
            if len(found) == _ROWS_AT_ONCE:
                tables.append(_columns(found, schema))
                found = []
        tables.append(_columns(found, schema))
        table, rows = pa.concat_tables(tables), np.array(numbers, np.int64)
    except (msgspec.MsgspecError, pa.ArrowException, UnicodeError, OverflowError) as error:
        raise UnusualLogError(f"{log}: {error}") from error
    if pc.count_distinct(table["id"]).as_py() != table.num_rows:
        raise UnusualLogError(f"{log}: a document twice")
    return table, rows


_NO_CONFIDENCE = b'"confidence": {}'


def _columns(found: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Return a column for each field of the parsed records."""
    columns = []
    for field in schema:
        values = list(map(attrgetter(field.name), found))
        if field.name == "confidence":
            parts = [pa.array(list(map(attrgetter(part.name), values)), part.type) for part in field.type]
            columns.append(pa.StructArray.from_arrays(parts, fields=list(field.type)))
        else:
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


@dataclass(frozen=True, eq=False)
class _Documents:
    """What logs of the same documents have in common: a study asks all its models, and under all shifts, the same.

    Attributes:
        told: What a log tells of the documents, in its order.
        order: Places of the documents in the log, sorted by id, shape (n,).
        fingerprint: As `TaskRecords.documents`; the others are also as there.
    """

    told: pa.Table
    order: npt.NDArray[np.int64]
    ids: npt.NDArray[np.str_]
    image: npt.NDArray[np.int32]
    names: npt.NDArray[np.str_]
    questions: pa.Array
    truths: pa.Array
    parts: npt.NDArray[np.str_]
    strata: npt.NDArray[np.str_] | None
    fingerprint: str


_OF_DOCUMENTS = ("id", "image", "expression", "target", "stratum", "question", "answers", "part")
_RECENT: deque[_Documents] = deque(maxlen=8)


def _documents(table: pa.Table) -> _Documents:
    """Return what a log tells of its documents: the same object for a log of the same documents read shortly before."""
    told = table.select([name for name in table.column_names if name in _OF_DOCUMENTS])
    known = next((one for one in tuple(_RECENT) if one.told.equals(told)), None)
    if known is not None:
        return known
    order = pc.sort_indices(told["id"])
    sorted_by_id = told.take(order).combine_chunks()
    question, truth = ("expression", "target") if "target" in told.column_names else ("question", "answers")
    ids, (index, names) = _texts(sorted_by_id["id"]), _coded(sorted_by_id["image"])
    questions, truths = _whole(sorted_by_id[question]), _whole(sorted_by_id[truth])
    size = table.num_rows
    found = _Documents(
        told,
        order.to_numpy(),
        ids,
        index,
        names,
        questions,
        truths,
        _texts(pc.fill_null(sorted_by_id["part"], "")) if "part" in told.column_names else np.full(size, "", np.str_),
        _strata(sorted_by_id),
        fingerprint(ids, names[index], questions, truths),
    )
    for shared in (ids, index, names, found.parts, found.strata):
        if shared is not None:
            shared.flags.writeable = False
    # Large ones are not worth their memory: reading takes longer than anything that is saved.
    if size <= _ROWS_AT_ONCE:
        _RECENT.append(found)
    return found


def _records(
    task: str, config: Mapping[str, Any], kind: TaskKind, table: pa.Table, numbers: npt.NDArray[np.int64], log: Path
) -> TaskRecords:
    size = table.num_rows
    parsed = np.ones(size, np.bool_)
    if kind is GROUNDING:
        parsed = table["box"].is_valid().to_numpy()
    elif kind is VQA:
        parsed = ~pc.fill_null(table["unfinished"], False).to_numpy()
    of = _documents(table)
    records = TaskRecords(
        task,
        kind,
        place_of(config),
        of.ids,
        numbers[of.order],
        of.image,
        of.names,
        of.questions,
        of.truths,
        of.parts,
        _fractions(table[kind.score], log)[of.order],
        np.asarray(parsed, np.bool_)[of.order],
        {name: values[of.order] for name, values in _confidence(table, log).items()},
        strata=of.strata,
    )
    # It takes longer than measuring some of the metrics.
    vars(records)["documents"] = of.fingerprint
    return records


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
