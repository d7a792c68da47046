"""Entry point for lmms-eval's group `lmms_eval.models`: registers our models and, with them, our tasks.

lmms-eval 0.7 discovers models by entry point but tasks only by a path on its command line. It loads models before it
looks for tasks; at that moment three methods of its `TaskManager` are wrapped, once, so that it finds our folder. They
are wrapped only if they look as in the version this was written against. The wrapped methods also let a task's
configuration ask a `DataSource` for the place of its rows.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_plugin.ending import ends_the_command
from lmms_plugin.quant_backends import GGUF, SERVED, class_name, model_name, names
from lmms_plugin.tasks.sources.data_source import located
from lmms_plugin.utils import libyaml
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.moved import MovedError
from lmms_plugin.vlm.running.sharding import deal_by_image

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

TESTED = "0.7"
_MARK = "_lmms_plugin"
_EXPECTED = {
    "initialize_tasks": ["self", "include_path", "include_defaults"],
    "_get_config": ["self", "name"],
    "load_task_or_group": ["self", "task_list", "task_type"],
}


def tasks_folder() -> str:
    """Return the folder of this package's task YAML, for `TaskManager(include_path=...)` and `--include_path`."""
    return str(files("lmms_plugin.tasks"))


def manifests() -> "list[ModelManifest]":
    """Return one manifest per quantization backend, and one for served models.

    As a side effect, make our tasks visible to every `TaskManager` and keep questions about one image together.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    _warn_if_untested(version("lmms-eval"))
    make_tasks_visible()
    deal_by_image()
    return [*(_manifest(ModelManifest, backend) for backend in names()), *_served(ModelManifest)]


def _manifest(make: "type[ModelManifest]", backend: str) -> "ModelManifest":
    """Return a manifest with the chat class, and the one for `--force_simple`, which multiple-choice tasks need."""
    path = f"lmms_plugin.vlm.wrapper.{class_name(backend)}"
    return make(model_id=model_name(backend), chat_class_path=path, simple_class_path=f"{path}Simple")


def _served(make: "type[ModelManifest]") -> "list[ModelManifest]":
    paths = {SERVED: "lmms_plugin.vlm.served.model", GGUF: "lmms_plugin.vlm.served.llamacpp.gguf_model"}
    classes = {name: f"{module}.{class_name(name)}" for name, module in paths.items()}
    return [
        make(model_id=model_name(name), chat_class_path=path, simple_class_path=f"{path}Simple")
        for name, path in classes.items()
    ]


def _warn_if_untested(found: str) -> None:
    if not found.startswith(f"{TESTED}."):
        _warn(
            f"lmms-plugin is tested with lmms-eval {TESTED}.x, found {found}. Models named quant_* are registered; "
            f"if tasks are missing, add --include_path {tasks_folder()} (single cells of *_shift then have no name)."
        )


def _warn(message: str) -> None:
    from loguru import logger

    logger.warning(message)


def make_tasks_visible() -> None:
    """Make every `TaskManager` index our tasks; a second call does nothing.

    If lmms-eval's methods are not the expected ones, warn and name `--include_path` instead of patching.
    """
    from lmms_eval.api.task import ConfigurableTask, TaskConfig
    from lmms_eval.tasks import TaskManager

    # A task that is found by --include_path alone needs this one as well.
    if not getattr(TaskConfig.__post_init__, _MARK, False):
        _wrap(TaskConfig, "__post_init__", _locating_data)
    if getattr(TaskManager.initialize_tasks, _MARK, False):
        return
    for name, expected in _EXPECTED.items():
        found = list(inspect.signature(getattr(TaskManager, name, lambda: None)).parameters)
        if found != expected:
            _warn(
                f"lmms-eval's TaskManager.{name} takes {found}, expected {expected}: tasks of lmms-plugin are not "
                f"added by themselves. Add --include_path {tasks_folder()}; models named quant_* work as usual."
            )
            return
    _wrap(TaskManager, "initialize_tasks", _indexing_ours)
    _wrap(TaskManager, "_get_config", _filling_in_cells)
    _wrap(TaskManager, "load_task_or_group", _explaining_data_errors)
    if list(inspect.signature(ConfigurableTask.set_config).parameters) == ["self", "key", "value", "update"]:
        _wrap(ConfigurableTask, "set_config", refusing_examples)


def _wrap(cls: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(cls, name)
    wrapped = wraps(original)(wrapper(original))
    setattr(wrapped, _MARK, True)
    setattr(cls, name, wrapped)


def _indexing_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_tasks(self: Any, include_path: Any = None, include_defaults: bool = True) -> dict[str, Any]:
        from lmms_plugin.tasks.registry import cells

        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        if tasks_folder() not in paths:
            paths.append(tasks_folder())
        with libyaml.parsing():
            index: dict[str, Any] = original(self, include_path=paths, include_defaults=include_defaults)
        for name, entry in cells.entries().items():
            # In lmms-eval, -1 means "the list of subtasks is in the group's own config".
            subtasks = {"task": -1} if entry.kind == "group" else {}
            index.setdefault(
                name, {"type": entry.kind, "yaml_path": str(entry.yaml), "overrides": entry.overrides, **subtasks}
            )
        _refuse_folders(index)
        return index

    return initialize_tasks


def _refuse_folders(index: Mapping[str, Any]) -> None:
    """Refuse `--tasks NAME` where a folder of that name hides the task: lmms-eval takes it for a folder of YAML files.

    Raises:
        ValueError: Such a folder exists.
    """
    given = [value.partition("=")[2] for value in sys.argv if value.startswith("--tasks=")]
    given += [value for flag, value in pairwise(sys.argv) if flag == "--tasks"]
    for name in given:
        if name in index and Path(name).is_dir():
            raise ValueError(
                f"--tasks {name}: expected the task, but lmms-eval would read the folder {Path(name).resolve()} of the"
                " same name instead; rename it or start elsewhere"
            )


def _filling_in_cells(original: Callable[..., Any]) -> Callable[..., Any]:
    def _get_config(self: Any, name: str) -> dict[str, Any]:
        overrides = self.task_index.get(name, {}).get("overrides", {})
        return {**original(self, name), **overrides}

    return _get_config


def _locating_data(original: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(self: Any) -> None:

        try:
            self.dataset_path, self.dataset_kwargs = located(self.dataset_path, self.dataset_kwargs)
        except DatasetError as error:
            raise DatasetError(f"{self.task}: {error}") from error
        original(self)

    return __post_init__


def _explaining_data_errors(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_task_or_group(self: Any, task_list: Any = None, task_type: str = "simple") -> dict[str, Any]:
        from tenacity import RetryError

        try:
            loaded: dict[str, Any] = original(self, task_list, task_type)
        except DatasetError:
            with ends_the_command():
                raise
        except (RetryError, ImportError, KeyError) as error:
            explained = _old_name(error, task_list) or _data_error(error, task_list)
            if explained is None:
                raise
            with ends_the_command():
                raise explained from error
        return loaded

    return load_task_or_group


def refusing_examples(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return lmms-eval's `set_config`, changed to refuse `--num_fewshot` for our tasks, which take no examples."""

    def set_config(self: Any, key: str, value: Any, update: bool = False) -> None:
        scoring = self.config.process_results
        module = getattr(getattr(scoring, "func", scoring), "__module__", None) or ""
        if key == "num_fewshot" and value and module.startswith("lmms_plugin."):
            with ends_the_command():
                raise ValueError(
                    f"--num_fewshot: expected 0 or nothing, got {value}: {self.config.task} takes no examples"
                )
        original(self, key, value, update)

    return set_config


def _old_name(error: BaseException, task_list: Any) -> Exception | None:
    """Return the error about an old name of ours that a task's YAML gives; None if there is none."""
    told = (cause for cause in _causes(error) if isinstance(cause, MovedError))
    return next((ImportError(f"{task_list}: !function: {cause}") for cause in told), None)


def _data_error(error: BaseException, task_list: Any) -> Exception | None:
    """Return the data error that caused what lmms-eval raised while it loaded our tasks; None if there is none."""
    from lmms_plugin.tasks.captions import captioning
    from lmms_plugin.tasks.grounding import natural, refcocoplus
    from lmms_plugin.tasks.grounding.refcocoplus import SPLITS
    from lmms_plugin.tasks.retrieval import matching
    from lmms_plugin.tasks.sources.origins import DatasetOrigin
    from lmms_plugin.tasks.vqa import datasets

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, DatasetError):
            return DatasetError(f"{task_list}: {cause}")
    reason = (str(causes[-1]) or type(causes[-1]).__name__).splitlines()[0]
    said = " ".join(map(str, causes))
    asked = [task_list] if isinstance(task_list, str) else [str(name) for name in task_list or []]
    own: list[DatasetOrigin] = (
        [matching.SETS["flickr30k"]] if any(name.startswith("flickr30k_retrieval") for name in asked) else []
    )
    own += captioning.SETS.values() if any(name.startswith("coco_caption_") for name in asked) else []
    for shifted in (*natural.SETS.values(), *own):
        if shifted.hub_id and re.search(rf"{re.escape(shifted.hub_id)}(?!\w)", said):
            return DatasetError(f"{task_list}: cannot load {shifted.place()}: {reason}. {shifted.hint}")
    if any(name.startswith("refcocoplus_") for name in asked):
        source = refcocoplus.source()
        if isinstance(error, KeyError) and error.args[0] in SPLITS:
            return DatasetError(f"{task_list}: {source} has no split {error.args[0]!r}. {refcocoplus.HINT}")
        problem = f"cannot load {source}: {reason}. {refcocoplus.HINT}"
    elif any(name.startswith("reliable_") for name in asked):
        problem = f"{reason}. {datasets.HINT}"
    else:
        return None
    return DatasetError(f"{task_list}: {problem}") if causes[1:] else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        attempt = getattr(error, "last_attempt", None)
        error = attempt.exception() if attempt is not None else error.__cause__
