"""Whether lmms-eval can be imported, and finds our models and tasks."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata

from lmms_plugin.doctor.imports import import_late
from lmms_plugin.doctor.packages import OURS
from lmms_plugin.doctor.rows import DiagnosisRow, fail, ok

MODULES = ("lmms_eval.evaluator", "lmms_eval.__main__")
"""What a run imports, and whose functions import more when they are called."""

MODEL = "quant_awq"
TASKS = ("refcocoplus_shift", "refcocoplus_shift_testB_gaussian_noise_3")
"""A group, and a cell that no file names."""


def check_evaluator() -> Iterator[DiagnosisRow]:
    """Import what a run imports, at its start and later."""
    for name in MODULES:
        import_late(importlib.import_module(name))
    yield ok("lmms-eval", f"lmms-eval {metadata.version('lmms_eval')} can be imported")


def check_models() -> Iterator[DiagnosisRow]:
    """Ask lmms-eval's registry for our models."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    from lmms_plugin.registration import manifests

    # lmms-eval itself only warns when this fails.
    ours = [manifest.model_id for manifest in manifests()]
    missing = sorted(set(ours) - set(MODEL_REGISTRY_V2.list_model_names()))
    if missing:
        yield fail("models", f"lmms-eval does not find {', '.join(missing)}", f"pip install --force-reinstall {OURS}")
        return
    MODEL_REGISTRY_V2.get_model_class(MODEL)
    yield ok("models", f"lmms-eval finds all {len(ours)} models, and loads the class of {MODEL}")


def check_tasks() -> Iterator[DiagnosisRow]:
    """Ask lmms-eval's task manager for our tasks."""
    import lmms_eval.models  # noqa: F401 - lmms-eval learns of our tasks while it registers models
    from lmms_eval.tasks import TaskManager

    from lmms_plugin.registration import tasks_folder

    # Reading lmms-eval's own thousands takes ten seconds.
    found = TaskManager(include_defaults=False).match_tasks(list(TASKS))
    missing = [name for name in TASKS if name not in found]
    if missing:
        yield fail("tasks", f"lmms-eval does not find {', '.join(missing)}", f"add --include_path {tasks_folder()}")
    else:
        yield ok("tasks", f"lmms-eval finds the tasks, e.g. {', '.join(TASKS)}")
