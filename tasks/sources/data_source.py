"""Places of a task's rows, resolved when the task is loaded, not when its YAML is read or a module is imported.

`dataset_path: !function lmms_plugin.tasks.grounding.natural.ref_l4_test` names a `DataSource`, which returns path and
arguments.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DataSource(Protocol):
    """A dataset that finds its own place, for example by an environment variable."""

    def load_arguments(self) -> tuple[str, dict[str, Any]]:
        """Return path and keyword arguments for `datasets.load_dataset`.

        Raises:
            DatasetError: The dataset is not where the user says it is.
        """


def located(path: Any, arguments: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any] | None]:
    """Return a task's `dataset_path` and `dataset_kwargs` as lmms-eval takes them.

    Args:
        path: `DataSource`, or any other value, which is returned as it is.
        arguments: Arguments of the task, which override those of the source.

    Raises:
        DatasetError: As `DataSource.load_arguments`.
    """
    if not isinstance(path, DataSource):
        return path, arguments
    found, own = path.load_arguments()
    return found, {**own, **(arguments or {})}
