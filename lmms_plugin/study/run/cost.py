"""Estimated time of a cell: from similar finished cells, or from a model with a few constants."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from lmms_plugin.quant_backends import backend_class
from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.quant_backends.plans.specs import DEFAULT_SAMPLES, MOST_SHARED_BYTES
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.task_images import image_counts
from lmms_plugin.study.file.tasks import known
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.messages import counted

START = 16.0
"""Seconds until lmms-eval answers its first question, on one core of a server's processor (`bench.cell_time`)."""
IMPORTS = 11.0
"""Seconds of these that importing libraries takes, which cells of one machine do once."""
TOKENS = 512
"""Tokens of an image, a question and an answer together."""
CPU_RATE, GPU_RATE = 2e10, 1e14
"""Operations per second reached on one core of a CPU in float32, and on a data-centre GPU in bfloat16."""

CALIBRATION_PASSES = 4
"""Passes over its samples that a calibrated method takes as long as: a block's inputs, the sums of their products, its
outputs when quantized, and a search on those sums."""

SHARED_PASSES = 2
"""Passes of these that cells share which take the same statistics: the inputs, and the sums of their products."""
GRADIENT_PASSES = 3
"""Passes of methods that weigh tokens besides: forward, each block again, and backward to the activations."""
ANSWER_PASSES = 2
"""Passes where the model writes questions and answers itself: the prompt of each is read."""
WRITTEN_TOKENS, TOKEN_SECONDS = 72, 0.01
"""Longest question and answer of a sample, and the least time of a token that is written alone, on any device."""
STATISTICS_BYTES = 5
"""Bytes of such sums per parameter of a model: a layer's inputs have about as many products as it has weights."""

STATED = "stated model, not measured"


class Seconds(NamedTuple):
    """Estimated time of a cell.

    Attributes:
        value: Seconds; None if unknown.
        basis: Basis of the estimate, in words.
    """

    value: float | None
    basis: str


class Past(NamedTuple):
    """A finished cell of the same folder.

    Attributes:
        about: Content of its `cell.json`.
        seconds: Time it took.
    """

    about: Mapping[str, Any]
    seconds: float


class CalibrationCost(NamedTuple):
    """What a sample of calibration costs.

    Attributes:
        passes: Passes over it.
        written: Number of tokens that the model writes for it, one after the other.
    """

    passes: int
    written: int


@dataclass
class SharedCosts:
    """What cells that were counted before have paid for, and cells after them on the same machine take over."""

    _paid: set[Hashable] = field(default_factory=set)

    def start(self, cell: Cell, *, cuda: bool) -> float:
        """Return the seconds until a cell answers its first question."""
        alone = cell.resources.processes > 1
        return START if alone or self._first(("libraries", cuda)) else START - IMPORTS

    def calibration(self, cell: Cell, parameters: int) -> CalibrationCost:
        """Return what calibrating a cell takes of the passes and of the written tokens of one sample."""
        inputs, given = cell.calibrated_on, cell.arguments
        method = None if inputs is None else backend_class(cell.backend)
        if method is None or not issubclass(method, CalibratedBackend):
            return CalibrationCost(CALIBRATION_PASSES, 0)
        weighs = method.by_role or given.get("token_weights") is not None
        sums = 1 + 2 * method.by_role + method.holds_back
        fits = sums * STATISTICS_BYTES * parameters <= MOST_SHARED_BYTES
        wanted = (method.by_role, method.holds_back, method.keeps_rows, given.get("token_weights"))
        apart = method.sequential or method.asymmetric or not fits
        writes = str(given["calibration"]).partition(":")[0] == "self" and self._first(("answers", inputs))
        passes = CALIBRATION_PASSES + ANSWER_PASSES * writes
        passes += GRADIENT_PASSES * (weighs and self._first(("gradients", inputs)))
        passes -= SHARED_PASSES * (not apart and not self._first(("statistics", inputs, wanted)))
        return CalibrationCost(passes, WRITTEN_TOKENS * writes)

    def _first(self, what: Hashable) -> bool:
        known = what in self._paid
        self._paid.add(what)
        return not known


def past(folder: StudyFolder | None) -> list[Past]:
    """Return the finished cells of a folder; empty without a folder."""
    found: list[Past] = []
    if folder is None:
        return found
    for one in folder.finished():
        # Another runner may move the cell away at the same time.
        with suppress(FileNotFoundError):
            found.append(Past(folder.about(folder.done_path(one)), folder.done(one)["seconds"]))
    return found


def seconds(
    cell: Cell,
    finished: Iterable[Past],
    parameters: int | None = None,
    *,
    cuda: bool = False,
    shared: SharedCosts | None = None,
) -> Seconds:
    """Estimate how long a cell takes: the median of the most similar finished cells.

    Cells are similar if model, tasks and limit agree; among these, the same method, bits and calibration are preferred,
    then the same method. Without similar cells, and where the number of documents is known, the estimate is the time to
    start plus the time of the multiplications of answers and calibration.

    Args:
        cell: Cell of a study.
        finished: Finished cells of the same folder.
        parameters: Number of the model's parameters; None if unknown.
        cuda: Whether it runs on a GPU.
        shared: What cells that were counted before have paid for; None to count the cell by itself.
    """
    shared = shared or SharedCosts()
    start, calibrated = shared.start(cell, cuda=cuda), shared.calibration(cell, parameters or 0)
    asked = {"tasks": list(cell.tasks), "limit": cell.limit, "images": cell.images}
    asked |= {"processes": cell.resources.processes}
    alike = [one for one in finished if _named(one, asked) and one.about["axes"]["model"] == cell.axes.model]
    for axes in (("method", "bits", "calibration"), ("method",), ()):
        same = [one for one in alike if all(one.about["axes"][axis] == getattr(cell.axes, axis) for axis in axes)]
        if same:
            what = " and ".join(("model", "tasks", *axes))
            return Seconds(
                median(one.seconds for one in same), f"median of {counted(len(same), 'finished cell')} of equal {what}"
            )
    documents = documents_of(cell)
    if documents is None or parameters is None:
        missing = "number of documents" if documents is None else "size of the model"
        return Seconds(None, f"unknown: no cell like it is finished, and the {missing} is not known")
    rate = GPU_RATE if cuda else CPU_RATE
    samples = int(cell.arguments.get("calibration_samples", DEFAULT_SAMPLES)) if "calibration" in cell.arguments else 0
    calibration = f" and {samples} samples of calibration as {calibrated.passes} each" if samples else ""
    if written := samples * calibrated.written:
        calibration += f" and {written:,} tokens of the model's own at {TOKEN_SECONDS} s each"
    units = f"{counted(documents, 'document')}{calibration}"
    basis = f"{start:.0f} s and {units} of {TOKENS} tokens at {rate:.0e} operations per second"
    passed = documents + samples * calibrated.passes
    value = start + written * TOKEN_SECONDS + passed * TOKENS * 2 * parameters / rate
    return Seconds(value, f"{STATED}: {basis}")


def documents_of(cell: Cell) -> int | None:
    """Return the maximum number of documents of all tasks; None if one is unknown and there is no limit."""
    tasks = known(cell.tasks).values()
    several = [count for task in tasks for count in task.documents]
    if cell.images is not None:
        part = ImageSlice.parse(cell.images)
        try:
            counts = [image_counts([name]) for task in tasks for name in task.tasks]
        except ValueError:
            return None
        several = [one.documents_of(part.stop) - one.documents_of(part.start) for one in counts]
    limited = [count if cell.limit is None else min(cell.limit, count or cell.limit) for count in several]
    return None if None in limited else sum(count for count in limited if count is not None)


def _named(one: Past, asked: Mapping[str, Any]) -> bool:
    return all(one.about.get(name) == value for name, value in asked.items())
