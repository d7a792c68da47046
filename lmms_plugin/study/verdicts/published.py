"""Numbers from papers, printed beside a study's own where it runs the same model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml


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
    for table in _tables()["scores"]:
        if not _same(table, model, task) or metric not in table["columns"]:
            continue
        if method != "none" and table.get("components", components) != components:
            continue
        for row in table["rows"]:
            if row["method"] == method and (method == "none" or row["bits"] == bits):
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
    text = files("lmms_plugin.study.verdicts").joinpath("published.yaml").read_text(encoding="utf-8")
    tables: dict[str, list[dict[str, Any]]] = yaml.safe_load(text)
    return tables
