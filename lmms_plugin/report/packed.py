"""The numbers of one run as bytes and back, every one of them to the last bit."""

import io
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lmms_plugin.analysis.reliability import Number
from lmms_plugin.analysis.results import Place
from lmms_plugin.report.measuring import Family, Group, Measured, Task
from lmms_plugin.report.numbers import Numbers

_PER_TASK = ("value", "low", "high", "bins", "risk")
_PER_RECORD = ("score", "outcome")


def pack(numbers: Numbers) -> bytes:
    """Numbers as a file of numpy arrays."""
    measured = numbers.measured
    tasks, groups = list(measured.tasks.values()), list(measured.groups.items())
    told = {
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
    return written.getvalue()


def unpack(content: bytes) -> Numbers:
    """Numbers from what `pack` made."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        told = json.loads(arrays["told"].tobytes())
        documents = {name: pa.array(ids, pa.string()) for name, ids in told["documents"].items()}
        found = Measured({}, {}, documents)
        per_task = zip(*(arrays[name] for name in _PER_TASK), strict=True)
        sizes = [one[4] for one in told["tasks"]]
        per_record = zip(*(_parted(arrays[name], sizes) for name in _PER_RECORD), strict=True)
        for (task, family, place, *rest), values, records in zip(told["tasks"], per_task, per_record, strict=True):
            found.tasks[task] = Task(task, Family(*family), Place(*place), *rest, *values, *records)
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
    return [array[start:end] for start, end in pairwise(np.cumsum([0, *lengths]).tolist())]
