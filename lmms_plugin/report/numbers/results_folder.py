"""Reading and measuring of a folder of results by several processes, one results file at a time."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.analysis import axes, groups, logs, study_files
from lmms_plugin.analysis.axes import RunAxes
from lmms_plugin.analysis.groups import MeasuredRun
from lmms_plugin.analysis.measure import MeasurementSettings, MetricValue, rejection
from lmms_plugin.analysis.records import REJECTION, Texts
from lmms_plugin.analysis.study_files import CELL, CELLS, FAILED, FAILURES, About, place
from lmms_plugin.quant_backends.plans.report_schema import REPORT, Quantized
from lmms_plugin.report.numbers.kept import KeptMeasurements, Measurement
from lmms_plugin.utils.processes.freed_memory import keep_freed_memory
from lmms_plugin.utils.reading import accounts

UNFINISHED = (".running", FAILURES)
RESAMPLES = 500
"""Default number of resamples: half of the usual one, since a page has many intervals."""
ONE_PROCESS = 64 << 20
"""Bytes of logs below which starting processes takes longer than reading."""


class Layer(NamedTuple):
    """Quantization of one layer.

    Attributes:
        name: Name of the module.
        relative_error: Relative error of the weight.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class Cost:
    """Cost of a run; None where not logged.

    Attributes:
        bits_per_weight: Bits per quantized weight, scales and zero points included.
        bytes: Bytes of all parameters and buffers.
        tokens_per_second: Generated tokens ÷ generation time.
        seconds_to_quantize: Time of loading, calibration and quantization.
        kv_bits: Bits per element of a quantized key-value cache, scales and zero points included.
        kv_bytes: Bytes of that cache for the longest prompt of the run.
    """

    bits_per_weight: float | None = None
    bytes: float | None = None
    tokens_per_second: float | None = None
    seconds_to_quantize: float | None = None
    kv_bits: float | None = None
    kv_bytes: float | None = None


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """One finished run.

    Attributes:
        file: Results file.
        axes: Place in the study.
        model: Name of the model in lmms-eval.
        model_args: Model arguments as text.
        limit: Documents per task that it was limited to; None for all.
        date: Date and time of the run, of `lmms_plugin.analysis.logs.evaluated`; "" if unknown.
        cost: Cost of the run.
        layers: Quantization of each layer; empty without a quantization report.
        measured: Metrics of the run.
        others: Tasks that log no records of ours.
        rejection: Metrics of rejection tasks, whose answers are neither right nor wrong.
        batch_size: Batch size as given to lmms-eval; "" where not logged.
    """

    file: Path
    axes: RunAxes
    model: str
    model_args: str
    limit: float | None
    date: str
    cost: Cost
    layers: tuple[Layer, ...]
    measured: MeasuredRun
    others: tuple[str, ...] = ()
    rejection: tuple[MetricValue, ...] = ()
    batch_size: str = ""

    @property
    def tasks(self) -> dict[str, int]:
        """Return the tasks with metrics on the page, and the number of answers of each."""
        found = {task.task: task.records for task in self.measured.tasks.values()}
        for number in self.rejection:
            found[number.task] = max(number.records, found.get(number.task, 0))
        return found

    @property
    def answers(self) -> int:
        """Number of answers of all these tasks."""
        return sum(self.tasks.values())


class FailedCell(NamedTuple):
    """A cell of a study without results.

    Attributes:
        cell: Id of the cell.
        returncode: Exit status of its process.
        tail: Last line of its log.
    """

    cell: str
    returncode: int | None
    tail: str


class Folder(NamedTuple):
    """All results at or under a path.

    Attributes:
        runs: Finished runs, oldest first.
        failed: Failed cells of a study.
        documents: Fingerprint of documents → their ids.
        left_out: Results files without records of ours, and why.
        resamples: Number of resamples of the images for every interval.
    """

    runs: list[ReportedRun]
    failed: list[FailedCell]
    documents: dict[str, Texts]
    left_out: list[str]
    resamples: int


def read_folder(path: Path, settings: MeasurementSettings) -> Folder:
    """Read and measure every run at or under a path.

    Raises:
        ValueError: There is none, or a log is damaged or incomplete.
    """
    files = [file for file in logs.find(path) if not set(UNFINISHED) & set(_below(file, path))]
    runs: list[ReportedRun] = []
    left_out: list[str] = []
    documents: dict[str, Texts] = {}
    for file, measurement in zip(files, _measured(files, settings), strict=True):
        documents |= measurement.measured.documents
        measurement.measured.documents.clear()
        run = _reported(file, path, measurement)
        if run.tasks:
            runs.append(run)
        else:
            left_out.append(f"{run.file}: no task of this package, but {', '.join(run.others) or 'none'}")
    if not runs:
        raise ValueError(f"expected runs with tasks of this package under {path}, got {'; '.join(left_out) or 'none'}")
    return Folder(runs, list(_failed(path)), documents, left_out, settings.resamples)


def read_run(file: Path, root: Path, settings: MeasurementSettings) -> ReportedRun:
    """Read and measure one results file.

    Raises:
        ValueError: As `lmms_plugin.analysis.logs.read`.
    """
    return _reported(file, root, _measure(file, settings, None))


def _reported(file: Path, root: Path, measurement: Measurement) -> ReportedRun:
    """Return a run with what its results file, its cell and its account of layers tell."""
    content = logs.table(file)
    config = content.get("config") or {}
    where = axes.of(file, root, content)
    account = _account(where.folder)
    batch_size = config.get("batch_size")
    return ReportedRun(
        file,
        where,
        str(config.get("model") or ""),
        str(config.get("model_args", "")),
        logs.limit_of(config),
        logs.evaluated(content) or "",
        _cost(content.get("throughput") or {}, account),
        _layers(account),
        measurement.measured,
        measurement.others,
        measurement.rejection,
        "" if batch_size is None else str(batch_size),
    )


def _measure(file: Path, settings: MeasurementSettings, kept: KeptMeasurements | None) -> Measurement:
    place = None if kept is None else kept.place(file)
    run = logs.read(file, settings.estimators)
    answered = [one for one in run.tasks.values() if one.kind is not REJECTION]
    # A run limited to the first documents of a task with a split of its own may hold none that are reported on.
    empty = [one.task for one in answered if not one.reported.any()]
    # Processes do the parallel work here, not threads.
    alone = replace(settings, workers=1)
    measurement = Measurement(
        groups.measure([one for one in answered if one.task not in empty], alone),
        tuple(number for one in run.tasks.values() if one.kind is REJECTION for number in rejection(one, alone)),
        (*run.others, *empty),
    )
    if kept is not None:
        kept.write(place, measurement)
    return measurement


def _measured(files: Sequence[Path], settings: MeasurementSettings) -> Iterator[Measurement]:
    """Yield the measurement of every run: as it was kept, else by several processes."""
    kept = KeptMeasurements.of(settings)
    new = [file for file in files if kept is None or not kept.has(file)]
    measured = dict.fromkeys(new)
    results = _in_processes(new, partial(_measure, settings=settings, kept=kept), settings.workers)
    for file in files:
        known = None if kept is None or file in measured else kept.read(file)
        if known is not None:
            yield known
        elif file in measured:
            yield next(results)
        else:
            # It was damaged, or removed meanwhile.
            yield _measure(file, settings, kept)


def _in_processes(files: Sequence[Path], work: Any, workers: int) -> Iterator[Measurement]:
    if workers == 1 or len(files) <= 1 or sum(_log_bytes(file) for file in files) < ONE_PROCESS:
        yield from map(work, files)
        return
    # Forking a process that has threads (BLAS, pyarrow) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(files)), context, keep_freed_memory) as pool:
        yield from pool.map(work, files, chunksize=max(1, min(8, len(files) // (4 * workers))))


def _log_bytes(file: Path) -> int:
    return sum(log.stat().st_size for log in logs.logs_of(file))


def _below(file: Path, path: Path) -> tuple[str, ...]:
    return file.relative_to(path).parts if file != path else ()


def _account(folder: Path) -> dict[str, Any]:
    file = folder / REPORT
    return accounts.read(file, Quantized) if file.is_file() else {}


def _cost(throughput: Mapping[str, Any], account: Mapping[str, Any]) -> Cost:
    def told(name: str) -> float | None:
        value = account.get(name, throughput.get(f"avg_{name}"))
        return _number(value)

    tokens, seconds = (_number(throughput.get(name)) for name in ("total_gen_tokens", "total_elapsed_time"))
    return Cost(
        told("bits_per_weight"),
        told("bytes_after"),
        tokens / seconds if tokens and seconds else None,
        told("seconds"),
        told("kv_bits_per_element"),
        told("kv_bytes"),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 2**63 else None


def _layers(account: Mapping[str, Any]) -> tuple[Layer, ...]:
    return tuple(
        Layer(module["name"], module["relative_error"])
        for module in account.get("modules") or ()
        if module.get("relative_error") is not None
    )


def _failed(path: Path) -> Iterator[FailedCell]:
    files = sorted(path.glob(f"{FAILURES}/*/{FAILED}"))
    finished = {place(accounts.read(file, About)) for file in path.glob(f"{CELLS}/*/{CELL}")} if files else set()
    for file in files:
        about = file.with_name(CELL)
        # Changed code gives a cell another id: what failed under the old one may be finished under the new one.
        if about.is_file() and place(accounts.read(about, About)) in finished:
            continue
        told = accounts.read(file, study_files.FailureAccount)
        tail = told.get("tail") or ""
        lines = [line for line in (tail if isinstance(tail, list) else str(tail).splitlines()) if line.strip()]
        yield FailedCell(file.parent.name, told.get("returncode"), lines[-1] if lines else "")


def default_workers() -> int:
    """Return the number of processors."""
    return os.cpu_count() or 1
