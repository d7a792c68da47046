"""Where a task's rows come from, asked when the task is loaded and not when its YAML is read or a module imported.

`dataset_path: !function lmms_plugin.tasks.grounding.natural.ref_l4_test` names a `DataSource`, which tells path and
arguments.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DataSource(Protocol):
    """A dataset that looks for itself, e.g. at an environment variable."""

    def load_arguments(self) -> tuple[str, dict[str, Any]]:
        """Return path and keyword arguments for `datasets.load_dataset`.

        Raises:
            DatasetError: the dataset is not where the user says it is.
        """


def located(path: Any, arguments: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any] | None]:
    """Return a task's `dataset_path` and `dataset_kwargs` as lmms-eval takes them.

    Args:
        path: a `DataSource`, or whatever else a task names, which stays as it is.
        arguments: the task's own, which win over those of the source.

    Raises:
        DatasetError: see `DataSource`.
    """
    if not isinstance(path, DataSource):
        return path, arguments
    found, own = path.load_arguments()
    return found, {**own, **(arguments or {})}
