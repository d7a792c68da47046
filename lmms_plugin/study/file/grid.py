"""What a study asks, as values: grids of axes, and the cells they come to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from lmms_plugin.quant_backends import model_name

T = TypeVar("T")


class At(NamedTuple, Generic[T]):
    """A value and the place in the study file it comes from (file:line:column)."""

    value: T
    where: str


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        name: In tables.
        arguments: Model arguments, `pretrained` among them.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A quantizer with its options.

    Attributes:
        name: In tables; that of the backend unless it has options or a name of its own.
        backend: As in `quant_<backend>`.
        options: Of the backend.
    """

    name: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Components:
    """Which parts of a model are quantized.

    Attributes:
        name: In tables.
        chosen: Components that take the bits of the axis; empty where `bits` says all.
        bits: Component → bits, 16 for untouched; it takes the place of the axis. Empty where `chosen` says all.
    """

    name: str
    chosen: tuple[str, ...] = ()
    bits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Where a calibrated method's inputs come from.

    Attributes:
        name: In tables.
        source: As `--model_args calibration=` takes it.
        samples: How many; None for the package's own number.
    """

    name: str
    source: str
    samples: int | None = None


@dataclass(frozen=True)
class Resources:
    """What a cell needs.

    Attributes:
        gpus: How many it has to itself; 0 runs on the CPU even where there is one; None for one where there is any.
        processes: Processes that share the documents of one cell, each on GPUs of its own.
        cpus: Cores, which a cluster sets apart; None for one per process.
        timeout: Seconds after which a cell is ended and has failed; None to wait as long as it takes.
    """

    gpus: int | None = None
    processes: int = 1
    cpus: int | None = None
    timeout: int | None = None


@dataclass(frozen=True)
class Exclusion:
    """Cells that are not run: those whose axes have the values named here.

    Attributes:
        axes: Axis → values.
        tasks: Tasks that such cells leave out; none to leave out the cells.
        where: In the study file.
    """

    axes: Mapping[str, tuple[Any, ...]]
    tasks: tuple[str, ...]
    where: str

    def matches(self, axes: Axes) -> bool:
        """Whether it speaks about a cell."""
        return all(getattr(axes, axis) in values for axis, values in self.axes.items())


@dataclass(frozen=True)
class Grid:
    """Axes whose product is run.

    Attributes:
        models: Checkpoints.
        methods: Quantizers.
        bits: Bits per weight; None for each method's own.
        group_sizes: Columns that share a scale; -1 for a whole row.
        components: Parts of the model.
        calibration: Sources of calibration inputs.
        seeds: Of calibration and sampling.
        tasks: Tasks of lmms-eval; each of these lists is answered by one process.
        limit: Documents per task; None for all.
        batch_size: As lmms-eval takes it.
        model_args: Further model arguments of every cell.
        resources: Of every cell.
        exclude: Cells to leave out.
        where: In the study file.
    """

    models: tuple[At[Model], ...]
    methods: tuple[At[Method], ...]
    bits: tuple[At[int | None], ...]
    group_sizes: tuple[At[int], ...]
    components: tuple[At[Components], ...]
    calibration: tuple[At[Calibration], ...]
    seeds: tuple[At[int], ...]
    tasks: tuple[At[tuple[str, ...]], ...]
    limit: int | None
    batch_size: int | str
    model_args: Mapping[str, Any]
    resources: Resources
    exclude: tuple[Exclusion, ...]
    where: str


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: Of the study.
        file: Where it was read.
        grids: What is run.
        analysis: What the analysis is to do, as the file says it; None for no analysis.
        asked_at: Name of each entry of `analysis` → its place in the file; "" → where the `analysis` stands.
    """

    name: str
    file: str
    grids: tuple[Grid, ...]
    analysis: Mapping[str, Any] | None
    asked_at: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Axes:
    """Where a cell stands in the study. None where an axis does not apply to it; bits are 16 without quantization."""

    model: str
    method: str
    bits: int | None
    group_size: int | None
    components: str | None
    calibration: str | None
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """One run of lmms-eval.

    Attributes:
        axes: Where it stands in the study.
        backend: Of the quantizer.
        arguments: Model arguments.
        tasks: Of lmms-eval.
        limit: Documents per task; None for all.
        batch_size: As lmms-eval takes it.
        resources: It needs.
    """

    axes: Axes
    backend: str
    arguments: Mapping[str, Any]
    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int | str
    resources: Resources

    @property
    def model(self) -> str:
        """The name of its model in lmms-eval."""
        return model_name(self.backend)

    @property
    def model_args(self) -> str:
        """Its model arguments on a command line."""
        return ",".join(f"{name}={value}" for name, value in self.arguments.items())

    @property
    def question(self) -> tuple[Any, ...]:
        """What it asks, whatever code, data and versions answer it."""
        return (self.place, self.model, self.model_args, self.batch_size, self.resources)

    @property
    def place(self) -> str:
        """What tells it from the other cells of its study."""
        return place({"axes": self.axes.to_dict(), "tasks": self.tasks, "limit": self.limit})

    @property
    def slug(self) -> str:
        """Readable beginning of its id."""
        axes = self.axes
        group = None if axes.group_size is None else ("row" if axes.group_size == -1 else f"g{axes.group_size}")
        bits = None if axes.bits is None else f"{axes.bits}bit"
        components = None if axes.components == "language" else axes.components
        seed = None if axes.seed is None else f"seed{axes.seed}"
        parts = [axes.model, axes.method, bits, group, components, axes.calibration, seed]
        words = "_".join(part for part in parts if part is not None)
        return "".join(c if c.isalnum() or c in "._+-" else "-" for c in words)[:100]


def gpus_needed(cell: Cell, there: int) -> int:
    """GPUs that a cell takes.

    Args:
        cell: What is asked.
        there: GPUs of the machine or cluster.
    """
    resources = cell.resources
    return (resources.processes if there else 0) if resources.gpus is None else resources.gpus


def place(about: Mapping[str, Any]) -> str:
    """What tells a cell from the others of its study, of what `cell.json` says: axes, tasks in any order, limit."""
    return json.dumps([about.get("axes"), sorted(about.get("tasks", ())), about.get("limit")], sort_keys=True)
