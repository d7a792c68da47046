"""What was measured of a study's cells, kept in the study's folder, so that not every report parses their logs.

It counts as long as results file, logs, settings and code are those that it was made with, and may be deleted at any
time. A file whose size and times of change are as they were is the same; of any other, all bytes are hashed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from lmms_plugin.reliability import Number, Settings
from lmms_plugin.report.measuring import Family, Group, Measured, Task
from lmms_plugin.report.numbers import Numbers
from lmms_plugin.results import Place, logs_of
from lmms_plugin.study import contents
from lmms_plugin.study.contents import digest
from lmms_plugin.study.durable import replace_bytes
from lmms_plugin.study.folder import CELLS, MEASURED

_ROOTS = ("lmms_plugin.report.numbers", __name__)
_SEAL_BYTES = 16
_PER_TASK = ("value", "low", "high", "bins", "risk")
_PER_RECORD = ("score", "outcome")


def path_of(cell: Path) -> Path | None:
    """Where the numbers of a study's cell are kept, in a folder beside `cells/`; None for any other folder."""
    return cell.parent.with_name(MEASURED) / f"{cell.name}.bin" if cell.parent.name == CELLS else None


def code() -> str:
    """Fingerprint of the code that makes numbers, with the versions of the libraries that it imports."""
    return digest(contents.code(_ROOTS))


def stamp(settings: Settings, made_by: str) -> str:
    """Fingerprint of what numbers depend on beside their files.

    Args:
        settings: Of the report.
        made_by: The code, as `code` tells it.
    """
    told = asdict(settings)
    # Threads change nothing.
    del told["workers"]
    return digest([made_by, told])


class State(NamedTuple):
    """What tells without reading it that a file is as it was. Copies that keep one time do not keep the other.

    Attributes:
        size: In bytes.
        modified: Its content, in nanoseconds since the epoch.
        changed: Anything about it, likewise.
    """

    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path) -> State:
        """Of a file as it is now."""
        now = file.stat()
        return cls(now.st_size, now.st_mtime_ns, now.st_ctime_ns)


class Source(NamedTuple):
    """A file that numbers are made of.

    Attributes:
        state: As it was before it was read.
        content: Hash of its bytes.
    """

    state: State
    content: str


def sources(file: Path) -> dict[str, Source]:
    """A results file and its logs, by name."""
    return {one.name: Source(State.of(one), _content(one)) for one in (file, *logs_of(file))}


def load(path: Path, file: Path, wanted: str) -> Numbers | None:
    """Kept numbers of a results file; None if there are none of that stamp and of these files, or they are damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    seal, archive = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
    if seal != _seal(wanted, archive):
        return None
    with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
        told = json.loads(arrays["told"].tobytes())
        same = _unchanged(file, {name: Source(State(*state), of) for name, (state, of) in told["sources"].items()})
        return _numbers(told, arrays) if same else None


def _unchanged(file: Path, before: Mapping[str, Source]) -> bool:
    now = {one.name: one for one in (file, *logs_of(file))}
    return now.keys() == before.keys() and all(
        State.of(one) == before[name].state or _content(one) == before[name].content for name, one in now.items()
    )


def _content(file: Path) -> str:
    with file.open("rb") as stream:
        # It is to tell changes, not forgeries, and takes a fifth of the time of SHA-256 for gigabytes of logs.
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def save(path: Path, made_with: str, made_of: Mapping[str, Source], numbers: Numbers) -> None:
    """Keep numbers of that stamp and of these files, where that is allowed."""
    measured = numbers.measured
    tasks, groups = list(measured.tasks.values()), list(measured.groups.items())
    told = {
        "sources": made_of,
        "tasks": [
            (one.task, one.family, one.place, one.documents, one.records, one.images, one.unparsed, one.unsure)
            for one in tasks
        ],
        "groups": [
            (family, condition, one.tasks, one.drawn, one.records, one.images, len(one.resampled))
            for (family, condition), one in groups
        ],
        "documents": {name: ids.to_pylist() for name, ids in measured.documents.items()},
        "rejection": numbers.rejection,
        "others": numbers.others,
    }
    arrays: dict[str, Any] = {name: _stacked([getattr(one, name) for one in tasks]) for name in _PER_TASK}
    arrays |= {name: _joined([getattr(one, name) for one in tasks]) for name in _PER_RECORD}
    arrays |= {"group": _stacked([one.value for _, one in groups])}
    arrays |= {"resampled": _joined([one.resampled for _, one in groups])}
    written = io.BytesIO()
    np.savez(written, allow_pickle=False, told=np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays)
    # Without them the next report takes longer, and nothing else.
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        replace_bytes(path, _seal(made_with, written.getvalue()) + written.getvalue())


def _seal(stamp: str, archive: bytes) -> bytes:
    """Ties an archive to its stamp: of another stamp, and of damaged bytes, it is another one."""
    return xxhash.xxh3_128_digest(stamp.encode() + archive)


def _numbers(told: dict[str, Any], arrays: Any) -> Numbers:
    found = Measured({}, {}, {name: pa.array(ids, pa.string()) for name, ids in told["documents"].items()})
    per_task = zip(*(arrays[name] for name in _PER_TASK), strict=True)
    per_record = zip(*(_parted(arrays[name], [one[4] for one in told["tasks"]]) for name in _PER_RECORD), strict=True)
    for (task, family, where, *rest), values, records in zip(told["tasks"], per_task, per_record, strict=True):
        found.tasks[task] = Task(task, Family(*family), Place(*where), *rest, *values, *records)
    resampled = _parted(arrays["resampled"], [one[-1] for one in told["groups"]])
    for group, value, rows in zip(told["groups"], arrays["group"], resampled, strict=True):
        family, condition, tasks, drawn, records, images, _ = group
        found.groups[Family(*family), condition] = Group(tuple(tasks), drawn, records, images, value, rows)
    return Numbers(found, tuple(Number(*one) for one in told["rejection"]), tuple(told["others"]))


def _stacked(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.stack(arrays) if arrays else np.empty(0)


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0)


def _parted(array: npt.NDArray[Any], lengths: Iterable[int]) -> list[npt.NDArray[Any]]:
    ends = np.cumsum([0, *lengths])
    if ends[-1] != len(array):
        raise ValueError(f"expected {ends[-1]} numbers, got {len(array)}")
    return [array[start:end] for start, end in pairwise(ends)]
