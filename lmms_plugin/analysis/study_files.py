"""Files that a study writes into its folder: names and schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lmms_plugin.utils.files import expect_inside
from lmms_plugin.utils.reading.accounts import Account

STUDY, CELL, DONE, FAILED, LOG = "study.yaml", "cell.json", "done.json", "failed.json", "log.txt"
VERDICT, VERDICT_IN_WORDS = "verdict.json", "verdict.md"
STAGES = "stages.json"
"""File of a study that stops when it knows: the images of each stage."""
CELLS = "cells"
"""Folder of the finished cells."""
FAILURES = "failed"
"""Folder of the records of failed cells."""

_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Name = Annotated[str, AfterValidator(expect_inside)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class StoredAxes(Account):
    """Axes of a cell, as `grid.CellAxes`; files of other versions may lack some."""

    model: str | None = None
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    components: str | None = None
    calibration: str | None = None
    seed: int | None = None


class About(Account):
    """`cell.json`: the question of a cell."""

    id: str = ""
    model: str = ""
    model_args: dict[str, str | int | float | bool | None] = Field({})
    axes: StoredAxes = StoredAxes()
    tasks: list[str] = Field([])
    limit: float | None = Field(None, allow_inf_nan=False)
    images: str | None = None
    batch_size: int | str = 1
    processes: int = 1
    command: list[str] = Field([])
    versions: dict[str, str | None] = Field({})


class Done(Account):
    """`done.json`: mark of a finished cell, with its files."""

    seconds: _Seconds
    files: dict[_Name, _Digest]
    finished: str = ""


class FailureAccount(Account):
    """`failed.json`: why a cell failed."""

    problem: str = ""
    returncode: int | None = None
    tail: str | list[str] = ""


class StagesAccount(Account):
    """`stages.json`: the parts of the images that a study asks about one after the other."""

    seed: int = Field(ge=0)
    images: list[int] = Field(min_length=1)
    documents: list[int] = Field(min_length=1)
    largest: int = Field(ge=1)
    boundaries: Literal["planned", "any-time"]


def place(about: Mapping[str, Any]) -> str:
    """Return what distinguishes the cell of a `cell.json` within its study: axes, tasks, limit, part of the images."""
    part = [] if about.get("images") is None else [about["images"]]
    return json.dumps([about.get("axes"), sorted(about.get("tasks", ())), about.get("limit"), *part], sort_keys=True)
