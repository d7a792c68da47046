"""The cells of a study, and what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lmms_plugin.analysis.study_files import place
from lmms_plugin.quant_backends import model_name
from lmms_plugin.utils.reading.validation import Expected, Whole, refused, validated

Count = Annotated[Whole, Field(ge=1), Expected("a whole number from 1")]


@validated
class Resources:
    """What a cell needs.

    Attributes:
        gpus: How many it has to itself; 0 runs on the CPU even where there is one; None for one where there is any
            (`auto` in a file).
        processes: Processes that share the documents of one cell, each on GPUs of its own.
        cpus: Cores, which a cluster sets apart; None for one per process.
        timeout: Seconds after which a cell is ended and has failed; None to wait as long as it takes.
    """

    gpus: Annotated[
        Annotated[Whole, Field(ge=0)] | None,
        BeforeValidator(lambda gpus: None if gpus == "auto" else gpus),
        Expected("a whole number from 0, or 'auto'"),
    ] = None
    processes: Count = 1
    cpus: Count | None = None
    timeout: Count | None = None

    def __post_init__(self) -> None:
        if self.gpus and self.gpus % self.processes:
            told = f"expected as many GPUs for each of the {self.processes} processes, got {self.gpus}"
            raise refused(told, "gpus", value=self.gpus)


@dataclass(frozen=True)
class CellAxes:
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

    axes: CellAxes
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
