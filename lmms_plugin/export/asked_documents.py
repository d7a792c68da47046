"""Hashes of the documents of a task, independent of answers, for comparing submissions and datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.utils import hashing

DESCRIBING = (
    *("id", "image", "part", "question", "answers", "expression", "target"),
    *("original_expression", "annotated", "pair", "matches", "change", "tags"),
)
"""Keys of a record that describe its document, all that scores depend on, and not the answer."""


def documents(run: LoggedRun, task: str) -> str:
    """Return the SHA-256 of all documents of a task of a run, independent of their order."""
    kind = run.tasks[task].kind
    with run.log(task).open("rb") as lines:
        told = sorted(_described(json.loads(line), kind.record) for line in lines)
    return hashing.of_value(told)


def _described(row: Mapping[str, Any], key: str) -> str:
    found = {name: row[key][name] for name in DESCRIBING if name in row[key]}
    if "shifted_rate" in row:
        found["shifted_rate"] = row["shifted_rate"]["score"]
    return json.dumps(found, sort_keys=True)
