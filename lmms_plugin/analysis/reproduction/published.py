"""Numbers from papers, printed beside our own where we run the same model."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from lmms_plugin.utils.files import json_object
from lmms_plugin.utils.reading import located
from lmms_plugin.utils.reading.readable import problem
from lmms_plugin.utils.reading.validation import Number, Schema, Text
from lmms_plugin.utils.suggest import unknown

GROUNDING_METRIC = "acc@0.5"
UNQUANTIZED_METHOD = "none"


class Published(NamedTuple):
    """A published number.

    Attributes:
        value: Value; a share where the source gives percent.
        source: Source, and what is known of how the number was measured.
    """

    value: float
    source: str


class Importances(NamedTuple):
    """Published importances of components.

    Attributes:
        shares: Component → percent of the score's variation; a component the model lacks is left out.
        source: Source of the importances.
    """

    shares: Mapping[str, float]
    source: str


class NamedBy(StrEnum):
    """What says which published model a checkpoint is."""

    ID = "its id on the hub"
    CONFIG = "_name_or_path in its config.json, which fine-tuned copies keep"
    USER = "--as"


class PublishedModel(NamedTuple):
    """A model with its published accuracies of grounding, unquantized.

    Attributes:
        name: Name as in the source.
        checkpoints: Ids on the hub with the weights that the source evaluated; empty where none is known.
        scores: Task → published Acc@0.5 in [0, 1].
    """

    name: str
    checkpoints: tuple[str, ...]
    scores: Mapping[str, Published]


class PublishedGrounding(NamedTuple):
    """All models with published accuracies of grounding.

    Attributes:
        models: Models by name, in the order of the record.
    """

    models: Mapping[str, PublishedModel]

    @classmethod
    def known(cls, own: Path | None = None) -> Self:
        """Return the record of this package, and the user's, which goes before.

        Args:
            own: YAML file with `grounding:` as in `published.yaml`; None for none.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not such a record; names what is wrong.
        """
        given = [] if own is None else [_read(located.load(own).plain(), str(own))]
        models: dict[str, PublishedModel] = {}
        for table in (*given, _read({"grounding": _tables()["grounding"]}, "published.yaml")):
            for one in table:
                models.setdefault(one.name, one)
        return cls(models)

    def named(self, name: str) -> PublishedModel:
        """Return the model of a name, in whatever case.

        Raises:
            ValueError: There is none; names the nearest and lists all.
        """
        found = next((one for key, one in self.models.items() if key.casefold() == name.casefold()), None)
        if found is None:
            raise unknown("published model", name, self.models)
        return found

    def of_checkpoint(self, checkpoint: str) -> PublishedModel | None:
        """Return the model that a checkpoint holds, by its id; None if no published number is known of it."""
        same = checkpoint.casefold()
        each = self.models.values()
        return next((one for one in each if same in map(str.casefold, one.checkpoints)), None)

    def identify(self, pretrained: str, name: str | None = None) -> tuple[PublishedModel, NamedBy]:
        """Return the model at a value of `pretrained`, and what says so.

        Args:
            pretrained: Id on the hub, or a folder whose config.json names one.
            name: Name of the published model that the user takes it for; None to go by the checkpoint alone.

        Raises:
            ValueError: No published number is known of it; lists the checkpoints of which there is one.
        """
        if name is not None:
            return self.named(name), NamedBy.USER
        folder = Path(pretrained).expanduser()
        config = folder / "config.json"
        name = pretrained
        if config.is_file():
            name = str(json_object(config.read_bytes(), str(config)).get("_name_or_path") or "")
        if (found := self.of_checkpoint(pretrained)) is not None:
            return found, NamedBy.ID
        if (found := self.of_checkpoint(name)) is not None:
            return found, NamedBy.CONFIG
        known = ", ".join(id_ for one in self.models.values() for id_ in one.checkpoints[:1])
        said = f"whose config.json names {name or 'none'!r:.100}" if config.is_file() else "by its name"
        raise ValueError(
            f"no published number is known of {pretrained!r:.200}, {said}; --as NAME says which published model it is,"
            f" --published FILE adds numbers (known: {known})"
        )


class _PublishedRow(Schema):
    name: Text
    checkpoints: tuple[Text, ...] = ()
    percent: tuple[Annotated[Number, Field(ge=0, le=100)] | None, ...]


class _PublishedTable(Schema):
    source: Text
    tasks: tuple[Text, ...]
    models: tuple[_PublishedRow, ...]

    @model_validator(mode="after")
    def _one_for_each_task(self) -> Self:
        for one in self.models:
            if len(one.percent) != len(self.tasks):
                raise ValueError(f"{one.name}: expected {len(self.tasks)} numbers in percent, got {len(one.percent)}")
        return self


class _PublishedFile(Schema):
    grounding: tuple[_PublishedTable, ...]


def _read(content: Any, where: str) -> list[PublishedModel]:
    try:
        tables = _PublishedFile.model_validate(content).grounding
    except ValidationError as error:
        raise ValueError(f"{where}: {problem(error)}") from error
    scores: dict[str, dict[str, Published]] = {}
    checkpoints: dict[str, tuple[str, ...]] = {}
    for table in tables:
        for one in table.models:
            numbers = zip(table.tasks, one.percent, strict=True)
            found = {task: Published(value / 100, table.source) for task, value in numbers if value is not None}
            scores[one.name] = scores.get(one.name, {}) | found
            checkpoints[one.name] = tuple(dict.fromkeys((*checkpoints.get(one.name, ()), *one.checkpoints)))
    return [PublishedModel(name, checkpoints[name], scores[name]) for name in scores]


def score(
    model: str, task: str, method: str, bits: int | None, metric: str, components: str | None = None
) -> Published | None:
    """Return the published value of a metric; None if there is none.

    Args:
        model: Value of `pretrained`.
        task: Name of the task.
        method: Quantization backend.
        bits: Bits per weight; 16 or None without quantization.
        metric: Metric as in lmms-eval's table.
        components: Quantized components; matters only where the source says what it quantized.
    """
    if method == UNQUANTIZED_METHOD and metric == GROUNDING_METRIC:
        grounding = PublishedGrounding.known().of_checkpoint(model)
        if grounding is not None and task in grounding.scores:
            return grounding.scores[task]
    for table in _tables()["scores"]:
        if not _same(table, model, task) or metric not in table["columns"]:
            continue
        if method != UNQUANTIZED_METHOD and table.get("components", components) != components:
            continue
        for row in table["rows"]:
            if row["method"] == method and (method == UNQUANTIZED_METHOD or row["bits"] == bits):
                value = row["values"][table["columns"].index(metric)]
                return Published(value / 100 if table["percent"] else value, table["source"])
    return None


def importances(model: str, task: str, method: str) -> Importances | None:
    """Return the published importances of a model's components; None if there are none. Arguments as of `score`."""
    for table in _tables()["importances"]:
        for row in table["rows"]:
            if _same(row, model, task) and row["method"] == method:
                named = zip(table["columns"], row["values"], strict=True)
                return Importances({name: share for name, share in named if share is not None}, table["source"])
    return None


def _same(entry: Mapping[str, Any], model: str, task: str) -> bool:
    return entry["model"].lower() in model.lower() and task.startswith(entry["task"])


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    text = files("lmms_plugin.analysis.reproduction").joinpath("published.yaml").read_text(encoding="utf-8")
    tables: dict[str, list[dict[str, Any]]] = yaml.safe_load(text)
    return tables
