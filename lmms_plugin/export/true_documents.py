"""Documents that a task really has, by loading its dataset through lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmms_plugin.analysis.logs import read
from lmms_plugin.analysis.records import KINDS
from lmms_plugin.export.asked_documents import documents
from lmms_plugin.export.definitions import definition
from lmms_plugin.registration import make_tasks_visible, tasks_folder


def true_documents(tasks: Iterable[str]) -> dict[str, str]:
    """Return task → SHA-256 of all its documents, computed as by `documents` for a run.

    Raises:
        DatasetError: A dataset cannot be loaded; says how to use a local copy.
    """
    from lmms_eval.tasks import TaskManager, get_task_dict

    make_tasks_visible()
    manager = TaskManager(include_path=tasks_folder(), include_defaults=False)
    return {task: _documents(task, get_task_dict([task], manager)[task]) for task in tasks}


def _documents(task: str, loaded: Any) -> str:
    """Hash what a run without answers would have logged: ids, questions and true answers."""
    score = definition(task).score
    rows = [{"doc_id": number, **score(doc, [""])} for number, doc in enumerate(loaded.eval_docs_no_media)]
    kind = next(kind for kind in KINDS if kind.record in rows[0])
    kept = ("doc_id", kind.record, "shifted_rate")
    logged = [{name: row[name] for name in kept if name in row} for row in rows]
    results = {
        "configs": {task: {}},
        "n-samples": {task: {"original": len(rows), "effective": len(rows)}},
        # A table without a number: nothing was answered.
        "results": {task: {}},
    }
    with TemporaryDirectory(prefix="lmms-plugin-") as folder:
        file = Path(folder, "run_results.json")
        file.write_text(json.dumps(results), encoding="utf-8")
        file.with_name(f"run_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, logged)), encoding="utf-8")
        return documents(read(file), task)
