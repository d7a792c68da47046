"""What a study writes into its folder: names of files, and schemas of what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lmms_plugin.utils.files import expect_inside
from lmms_plugin.utils.reading.accounts import Account

STUDY, CELL, DONE, FAILED, LOG = "study.yaml", "cell.json", "done.json", "failed.json", "log.txt"
VERDICT, VERDICT_IN_WORDS = "verdict.json", "verdict.md"
CELLS = "cells"
"""Folder of the finished cells."""
FAILURES = "failed"
"""Folder of what is said of the failed ones."""

_Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_Name = Annotated[str, AfterValidator(expect_inside)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class StoredAxes(Account):
    """The axes of a cell, as `grid.CellAxes`; files of other versions may lack some."""

    model: str | None = None
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    components: str | None = None
    calibration: str | None = None
    seed: int | None = None


class About(Account):
    """`cell.json`: what was asked."""

    id: str = ""
    model: str = ""
    model_args: dict[str, str | int | float | bool | None] = Field({})
    axes: StoredAxes = StoredAxes()
    tasks: list[str] = Field([])
    limit: float | None = Field(None, allow_inf_nan=False)
    batch_size: int | str = 1
    processes: int = 1
    command: list[str] = Field([])
    versions: dict[str, str | None] = Field({})


class Done(Account):
    """`done.json`: that a cell is finished, and with which files."""

    seconds: _Seconds
    files: dict[_Name, _Digest]
    finished: str = ""


class FailureAccount(Account):
    """`failed.json`: why a cell failed."""

    problem: str = ""
    returncode: int | None = None
    tail: str | list[str] = ""


def place(about: Mapping[str, Any]) -> str:
    """What tells a cell from the others of its study, of what `cell.json` says: axes, tasks in any order, limit."""
    return json.dumps([about.get("axes"), sorted(about.get("tasks", ())), about.get("limit")], sort_keys=True)
