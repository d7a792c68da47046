"""Measurements of runs that are kept, so that a later report measures only what is new or changed.

A run is measured again when its results file or a log of it changes, when other settings are asked for, or when the
code or a library that measures is another one. A kept measurement holds the same numbers to the last bit.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from lmms_plugin import analysis, metrics
from lmms_plugin.analysis import logs
from lmms_plugin.analysis.groups import MeasuredRun, Task, TaskGroup
from lmms_plugin.analysis.measure import Family, MeasurementSettings, MetricValue
from lmms_plugin.analysis.records import EvaluationSet
from lmms_plugin.utils import hashing, variables
from lmms_plugin.utils.files import State, replace_bytes

_KIND = "measured"
_LIBRARIES = ("numpy", "scipy", "pyarrow")
_ARRAYS = {
    Task: ("value", "low", "high", "bins", "risk", "score", "outcome"),
    TaskGroup: ("value", "low", "high"),
}
_HEADER = "header"


class Measurement(NamedTuple):
    """All that is measured of a run's logs.

    Attributes:
        measured: Metrics of tasks with right and wrong answers.
        rejection: Metrics of rejection tasks.
        others: Tasks without metrics: they log no records of ours, or none that are reported on.
    """

    measured: MeasuredRun
    rejection: tuple[MetricValue, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class KeptMeasurements:
    """Folder of kept measurements.

    Attributes:
        folder: Folder with one file for each run.
        measures: Fingerprint of settings, code and libraries, on which numbers depend besides the logs.
    """

    folder: Path
    measures: str

    @classmethod
    def of(cls, settings: MeasurementSettings) -> Self | None:
        """Return the user's folder; None if nothing is to be kept (`LMMS_PLUGIN_CACHE` is empty)."""
        folder = variables.cache_folder(_KIND)
        if folder is None:
            return None
        code = [hashing.of_code(Path(package.__path__[0])) for package in (analysis, metrics)]
        # Processes share the work and change no number.
        asked = {name: value for name, value in asdict(settings).items() if name != "workers"}
        return cls(folder, hashing.of_value([asked, code, *map(version, _LIBRARIES), hashing.of_file(Path(__file__))]))

    def place(self, file: Path) -> Path | None:
        """Return the file that holds the measurement of a run; None while a change of its files might leave no trace.

        Args:
            file: Results file.
        """
        read = [file, *logs.logs_of(file)]
        states = [State.of(one) for one in read]
        if not all(state.settled for state in states):
            return None
        told = [[str(one.resolve()), *state] for one, state in zip(read, states, strict=True)]
        return self.folder / f"{hashing.of_value([self.measures, told])[:40]}.npz"

    def has(self, file: Path) -> bool:
        """Return whether the measurement of a run is kept.

        Args:
            file: Results file.
        """
        place = self.place(file)
        return place is not None and place.is_file()

    def read(self, file: Path) -> Measurement | None:
        """Return the measurement of a run; None if it is not kept, or not whole.

        Args:
            file: Results file.
        """
        place = self.place(file)
        try:
            return None if place is None else decoded(place.read_bytes())
        # A damaged one is measured again.
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, BadZipFile):
            return None

    def write(self, place: Path | None, measurement: Measurement) -> None:
        """Keep the measurement of a run; a folder that cannot be written to keeps nothing.

        Args:
            place: What `place` returned before the logs were read; None for not keeping it.
            measurement: Measurement of the run.
        """
        if place is None:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(place, encoded(measurement))
        except OSError:
            return


def encoded(measurement: Measurement) -> bytes:
    """Encode a measurement: all numbers in one array for each type, the rest as JSON."""
    measured, arrays = measurement.measured, list[npt.NDArray[Any]]()

    def told(one: Task | TaskGroup) -> dict[str, Any]:
        large = _ARRAYS[type(one)]
        arrays.extend(getattr(one, name) for name in large)
        plain = {f.name: getattr(one, f.name) for f in fields(one) if f.name not in large}
        return plain | {"shapes": [[str(array.dtype), *array.shape] for array in arrays[-len(large) :]]}

    header = {
        "tasks": [told(task) for task in measured.tasks.values()],
        "groups": [[*where, told(group)] for where, group in measured.groups.items()],
        "resampled": [[*where, *array.shape] for where, array in measured.resampled.items()],
        "documents": {name: ids.tolist() for name, ids in measured.documents.items()},
        # JSON has no NaN.
        "rejection": [[one.task, one.metric, *one[-2:]] for one in measurement.rejection],
        "others": list(measurement.others),
    }
    arrays.extend(measured.resampled.values())
    arrays.append(np.array([one[2:5] for one in measurement.rejection], np.float64).reshape(-1, 3))
    header["values"] = len(measurement.rejection)
    whole = {
        str(kind): [array.ravel() for array in arrays if array.dtype == kind] for kind in {a.dtype for a in arrays}
    }
    stream = io.BytesIO()
    stored: dict[str, Any] = {kind: np.concatenate(parts) for kind, parts in whole.items()}
    stored[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(stream, **stored)
    return stream.getvalue()


def decoded(content: bytes) -> Measurement:
    """Read what `encoded` wrote.

    Raises:
        ValueError: It is something else, or damaged.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        numbers = {name: stored[name] for name in stored.files}
    header = json.loads(numbers.pop(_HEADER).tobytes())
    taken = dict.fromkeys(numbers, 0)

    def next_of(kind: str, shape: Sequence[int]) -> npt.NDArray[Any]:
        start, count = taken[kind], int(np.prod(shape, dtype=np.int64))
        taken[kind] = start + count
        # A copy each: what is kept of a run must not keep the rest in memory.
        array: npt.NDArray[Any] = numbers[kind][start : start + count].reshape(shape).copy()
        return array

    def arrays(kind: type, told: dict[str, Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name, (dtype, *shape) in zip(_ARRAYS[kind], told.pop("shapes"), strict=True):
            yield name, next_of(dtype, shape)

    tasks = {}
    for told in header["tasks"]:
        large: dict[str, Any] = dict(arrays(Task, told))
        told |= {"family": Family(*told["family"]), "place": EvaluationSet(*told["place"])}
        tasks[told["task"]] = Task(**told, **large)
    groups = {}
    for *family, condition, told in header["groups"]:
        large = dict(arrays(TaskGroup, told))
        groups[Family(*family[0]), condition] = TaskGroup(**told | {"tasks": tuple(told["tasks"])}, **large)
    resampled = {
        (Family(*family), condition): next_of("float64", shape) for family, condition, *shape in header["resampled"]
    }
    values = next_of("float64", (header["values"], 3)).tolist()
    rejection = tuple(
        MetricValue(task, metric, *value, *counts)
        for (task, metric, *counts), value in zip(header["rejection"], values, strict=True)
    )
    documents = {name: np.array(ids, np.str_) for name, ids in header["documents"].items()}
    return Measurement(MeasuredRun(tasks, groups, resampled, documents), rejection, tuple(header["others"]))
