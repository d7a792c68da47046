"""The columns a report needs of a log of samples, without parsing the rest of its rows.

A row of a log holds prompt, answer, probabilities and one copy of the confidence per metric; what counts is one object
in the middle. That object is cut out of the line and pyarrow parses nothing else, which takes a twentieth of the time
of parsing rows. Whatever is not exactly as lmms-eval and our tasks write it is left to `lmms_plugin.analysis.results`, which
reads slowly, and says what is wrong if anything is.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from lmms_plugin.analysis import results
from lmms_plugin.analysis.results import GROUNDING, KINDS, REJECTION, VQA, Kind, Place, TaskRecords
from lmms_plugin.utils.readable import readable

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_ROWS_AT_ONCE = 20_000


class UnusualLogError(ValueError):
    """A log that only the slow reader may judge."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The n answers of one task, sorted by document id. All arrays have shape (n,).

    Attributes:
        task: Name of the task.
        kind: What its records are.
        place: What it asks about.
        documents: Fingerprint of ids, images, questions and true answers: equal for runs on the same documents.
        ids: Document ids, strings.
        images: Index of each document's image in `names`.
        names: Names of the images, sorted, shape (images,).
        parts: Part of the split, "" where the task brings none.
        score: IoU with the true box (0 without a box), VQA accuracy, or whether there was a box, in [0, 1].
        outcome: What confidence is to tell: 1 for right and 0 for wrong, or the soft score.
        parsed: Whether the answer held a box; all True where no box was asked for.
        confidence: By the chosen estimator; NaN where there is none.
    """

    task: str
    kind: Kind
    place: Place
    documents: str
    ids: pa.Array
    images: npt.NDArray[np.int32]
    names: pa.Array
    parts: npt.NDArray[np.str_]
    score: Floats
    outcome: Floats
    parsed: Bools
    confidence: Floats

    @property
    def reported(self) -> Bools:
        """Which answers results are reported on."""
        return results.reported_parts(self.parts)


def read(
    task: str, config: Mapping[str, Any], log: Path, estimator: str | None, records: int, said: object
) -> Answers | None:
    """The answers of one task of a run; None for a task of rejection, and one that logs no records of ours.

    Args:
        task: Name of the task.
        config: Its configuration in the results file.
        log: Its log of samples.
        estimator: Confidence estimator; None for that of the kind of task.
        records: How many documents the run scored.
        said: The mean score of the results table, with which the log must agree; anything but a number to leave out.

    Raises:
        UnusualLogError: If the log is not exactly as our tasks write it.
    """
    if not log.exists():
        raise UnusualLogError(f"no log {log}")
    with log.open("rb", buffering=1 << 20) as lines:
        first = _first(lines.readline(), log)
        kind = next((kind for kind in KINDS if results.is_record(first.get(kind.record), kind)), None)
        # Whether an expression was rejected is not a right or wrong answer.
        if kind is None or kind is REJECTION:
            return None
        name = estimator or kind.estimator
        told = first[kind.record].get("confidence")
        if told and name not in told:
            raise UnusualLogError(f"{log}: no estimator {name}")
        lines.seek(0)
        table = _table(lines, kind, first, _schema(kind, first[kind.record], name), log)
    if table.num_rows != records:
        raise UnusualLogError(f"{log}: {table.num_rows} rows of {records}")
    return _answers(task, config, kind, _sorted(table, log), name, said, log)


def of(records: TaskRecords, estimator: str | None) -> Answers:
    """The same from records that were read slowly."""
    images = pa.array(records.images.tolist(), pa.string())
    index, names = _coded(images)
    asked = [json.loads(text) for text in records.asked.tolist()]
    questions = pa.array([None if question is None else str(question) for question, _ in asked], pa.string())
    with readable(f"task {records.task}: its true answers"):
        truths = pa.array([truth for _, truth in asked])
    ids = pa.array(records.ids.tolist(), pa.string())
    return Answers(
        records.task,
        records.kind,
        records.place,
        _fingerprint(*map(_joined, (ids, images, questions)), _truths(truths)),
        ids,
        index,
        names,
        records.parts,
        records.score,
        records.outcome,
        records.parsed,
        records.confidence_by(estimator),
    )


def _first(line: bytes, log: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UnusualLogError(f"{log}: {error}") from error
    if not isinstance(row, dict):
        raise UnusualLogError(f"{log}: no JSON object")
    return row


def _schema(kind: Kind, record: Mapping[str, Any], estimator: str) -> pa.Schema:
    number, text = pa.float64(), pa.string()
    fields = {"id": text, "image": text, kind.score: number}
    if kind is GROUNDING:
        fields |= {"expression": text, "target": pa.list_(number), "box": pa.list_(number)}
    if kind is VQA:
        truths = record.get("answers")
        fields |= {"question": text, "answers": pa.list_(text) if isinstance(truths, list) else text, "part": text}
    fields["confidence"] = pa.struct([(estimator, number)])
    return pa.schema(list(fields.items()))


def _table(lines: Iterator[bytes], kind: Kind, first: Mapping[str, Any], schema: pa.Schema, log: Path) -> pa.Table:
    """The records of all lines, cut out between the key before them and the key that follows in the first row."""
    keys = list(first)
    place = keys.index(kind.record)
    if place + 1 == len(keys):
        raise UnusualLogError(f"{log}: the record ends the row")
    # Inside a JSON string every quotation mark is escaped, so that these bytes stand for keys and nothing else.
    start = f'"{kind.record}": {{'.encode()
    stop = f'}}, "{keys[place + 1]}": '.encode()
    opening, skip = f'{{"{keys[0]}": '.encode(), len(start) - 1
    key = f'"{schema.field("confidence").type.field(0).name}": '.encode()
    tables, found = [], []
    for line in lines:
        begin = line.find(start)
        end = line.find(stop, begin)
        if begin < 0 or end < 0 or not line.startswith(opening) or line[-2:] != b"}\n":
            raise UnusualLogError(f"{log}: a row without {kind.record}")
        found.append(_one_confidence(line[begin + skip : end + 1], key))
        if len(found) == _ROWS_AT_ONCE:
            tables.append(_parsed(found, schema, log))
            found = []
    if found:
        tables.append(_parsed(found, schema, log))
    return pa.concat_tables(tables)


_CONFIDENCE = b'"confidence": {'


def _one_confidence(record: bytes, key: bytes) -> bytes:
    """A record with one confidence of a dozen, which halves what is to be parsed; as it is where that is not there."""
    start = record.find(_CONFIDENCE)
    end = record.find(b"}", start)
    wanted = record.find(key, start, end)
    if start < 0 or wanted < 0:
        return record
    comma = record.find(b",", wanted, end)
    return record[: start + len(_CONFIDENCE)] + record[wanted : comma if comma > 0 else end] + record[end:]


def _parsed(found: Sequence[bytes], schema: pa.Schema, log: Path) -> pa.Table:
    joined = b"\n".join(found)
    try:
        table = pj.read_json(
            pa.BufferReader(joined),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(joined) + 1),
            parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid as error:
        raise UnusualLogError(f"{log}: {error}") from error
    if table.num_rows != len(found):
        raise UnusualLogError(f"{log}: {table.num_rows} records in {len(found)} rows")
    return table


def _sorted(table: pa.Table, log: Path) -> pa.Table:
    needed = ["id", "image", *(name for name in ("score", "accuracy", "expression") if name in table.column_names)]
    if any(table[name].null_count for name in needed):
        raise UnusualLogError(f"{log}: missing values")
    table = table.take(pc.sort_indices(table["id"])).combine_chunks()
    if pc.count_distinct(table["id"]).as_py() != table.num_rows:
        raise UnusualLogError(f"{log}: a document twice")
    return table


def _answers(
    task: str, config: Mapping[str, Any], kind: Kind, table: pa.Table, estimator: str, said: object, log: Path
) -> Answers:
    score = _fractions(table[kind.score], log)
    confidence = np.full(score.size, np.nan)
    told = table["confidence"].combine_chunks()
    if told.null_count < len(told):
        if told.null_count:
            raise UnusualLogError(f"{log}: answers without confidence")
        confidence = _fractions(told.field(estimator), log)
    parts = np.full(score.size, "", np.str_)
    if "part" in table.column_names:
        parts = np.array(pc.fill_null(table["part"], "").to_pylist(), np.str_)
    parsed = table["box"].is_valid().to_numpy() if kind is GROUNDING else np.ones(score.size, np.bool_)
    question, truth = ("expression", "target") if kind is GROUNDING else ("question", "answers")
    index, names = _coded(table["image"])
    found = Answers(
        task,
        kind,
        results.place_of(config),
        _fingerprint(*map(_joined, (table["id"], table["image"], table[question])), _truths(table[truth])),
        table["id"].combine_chunks(),
        index,
        names,
        parts,
        score,
        score if kind.right is None else (score >= kind.right).astype(np.float64),
        np.asarray(parsed, np.bool_),
        confidence,
    )
    counted = score[found.reported]
    if isinstance(said, float | int) and counted.size and not math.isclose(said, counted.mean(), abs_tol=1e-6):
        raise UnusualLogError(f"{log}: not the log of the results table")
    return found


def _fractions(column: pa.ChunkedArray | pa.Array, log: Path) -> Floats:
    values = column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    array: Floats = np.asarray(values, np.float64)
    if np.any((array < 0.0) | (array > 1.0)):
        raise UnusualLogError(f"{log}: a value outside [0, 1]")
    return array


def _coded(images: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """Index of each image among the sorted names, and the names."""
    encoded = images.combine_chunks() if isinstance(images, pa.ChunkedArray) else images
    encoded = encoded.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(order.size, np.int32)
    rank[order] = np.arange(order.size, dtype=np.int32)
    return rank[encoded.indices.to_numpy()], encoded.dictionary.take(pa.array(order))


def _truths(column: pa.ChunkedArray | pa.Array) -> bytes:
    """True answers, boxes or texts, one after the other."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = array.flatten() if pa.types.is_list(array.type) else array
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        return np.asarray(values.to_numpy(zero_copy_only=False), np.float64).tobytes()
    return _joined(values)


def _joined(texts: pa.ChunkedArray | pa.Array) -> bytes:
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    whole = pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), pc.fill_null(array, ""))
    return bytes(pc.binary_join(whole, "\n")[0].as_buffer())


def _fingerprint(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
