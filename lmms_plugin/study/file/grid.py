"""The cells of a study, and the resources they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lmms_plugin.analysis.study_files import place
from lmms_plugin.quant_backends import model_name
from lmms_plugin.utils.processes.launch_command import LaunchCommand
from lmms_plugin.utils.reading.validation import Expected, Whole, refused, validated

Count = Annotated[Whole, Field(ge=1), Expected("a whole number from 1")]


@validated
class Resources:
    """Resources of a cell.

    Attributes:
        gpus: Number of GPUs reserved for the cell; 0 runs on the CPU even where a GPU exists; None for one GPU if there
            is any (`auto` in a file).
        processes: Processes that share the documents of the cell, each on its own GPUs.
        cpus: Cores that a cluster reserves; None for one per process.
        timeout: Seconds after which the cell is stopped and counts as failed; None for no limit.
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
    """Place of a cell in the study: None where an axis does not apply; bits are 16 without quantization."""

    model: str
    method: str
    bits: int | None
    group_size: int | None
    components: str | None
    calibration: str | None
    seed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the axes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """One run of lmms-eval.

    Attributes:
        axes: Place in the study.
        backend: Quantization method.
        arguments: Model arguments.
        tasks: Tasks of lmms-eval.
        limit: Documents per task; None for all.
        batch_size: Batch size as in lmms-eval.
        resources: Resources that the cell needs.
        images: Part of the images that it answers, as in `LMMS_PLUGIN_IMAGES`; None for all.
    """

    axes: CellAxes
    backend: str
    arguments: Mapping[str, Any]
    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int | str
    resources: Resources
    images: str | None = None

    @property
    def model(self) -> str:
        """Name of the model in lmms-eval."""
        return model_name(self.backend)

    @property
    def launch(self) -> LaunchCommand | None:
        """Command that starts the server which answers; None where none is started."""
        return LaunchCommand.parse(self.arguments["launch"]) if "launch" in self.arguments else None

    @property
    def model_args(self) -> str:
        """Model arguments as on a command line."""
        return ",".join(f"{name}={value}" for name, value in self.arguments.items())

    @property
    def calibrated_on(self) -> tuple[Any, ...] | None:
        """What tells the inputs of its calibration from those of other cells; None without calibration."""
        if "calibration" not in self.arguments:
            return None
        axes = self.axes
        return (axes.model, axes.components, axes.calibration, axes.seed, self.arguments.get("calibration_samples"))

    @property
    def question(self) -> tuple[Any, ...]:
        """Question of the cell, independent of code, data and versions."""
        return (self.place, self.model, self.model_args, self.batch_size, self.resources)

    @property
    def configuration(self) -> tuple[Any, ...]:
        """What is run, whatever it is called."""
        return (self.model, self.model_args, self.tasks, self.limit, self.images, self.batch_size, self.resources)

    @property
    def place(self) -> str:
        """Description that distinguishes the cell within its study."""
        said = {"axes": self.axes.to_dict(), "tasks": self.tasks, "limit": self.limit, "images": self.images}
        return place(said)

    @property
    def slug(self) -> str:
        """Readable prefix of the cell's id."""
        axes = self.axes
        group = None if axes.group_size is None else ("row" if axes.group_size == -1 else f"g{axes.group_size}")
        bits = None if axes.bits is None else f"{axes.bits}bit"
        components = None if axes.components == "language" else axes.components
        seed = None if axes.seed is None else f"seed{axes.seed}"
        images = None if self.images is None else f"images{self.images.partition(':')[2].replace(':', '-')}"
        parts = [axes.model, axes.method, bits, group, components, axes.calibration, seed, images]
        words = "_".join(part for part in parts if part is not None)
        return "".join(c if c.isalnum() or c in "._+-" else "-" for c in words)[:100]


def gpus_needed(cell: Cell, there: int) -> int:
    """Return the number of GPUs that a cell uses.

    Args:
        cell: Cell of a study.
        there: Number of GPUs of the machine or cluster.
    """
    resources = cell.resources
    return (resources.processes if there else 0) if resources.gpus is None else resources.gpus
