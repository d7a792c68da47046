"""Images of the tasks of a study, as the tasks themselves index them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from lmms_plugin.analysis.records import GROUNDING
from lmms_plugin.study.file.tasks import configured_place, known, looked_up
from lmms_plugin.tasks.registry import task_files
from lmms_plugin.utils.variables import IMAGES


def documents_by_image(tasks: Sequence[str]) -> Mapping[str, int]:
    """Return image id → number of documents, which have to be the same for all tasks.

    Args:
        tasks: Names of single tasks, at least one.

    Raises:
        ValueError: A task does not ask about parts of its images, its dataset cannot be read, or two tasks differ in
            their documents.
    """
    found: dict[str, Mapping[str, int]] = {}
    first: tuple[str, Mapping[str, int]] | None = None
    for task in tasks:
        config = _sliced(task)
        # Corruptions and severities share rows and documents.
        source = repr((configured_place(config), config.get("test_split"), config["process_docs"]))
        if source not in found:
            found[source] = _counted(config, task)
        first = first or (task, found[source])
        if found[source] != first[1]:
            raise ValueError(f"expected the same documents in every task, but {task} has others than {first[0]}")
    assert first is not None
    return first[1]


def _sliced(task: str) -> dict[str, Any]:
    source = task_files.sources().get(task)
    config = None if source is None else source.configuration
    if config is None or GROUNDING.record not in known([task])[task].metrics.get(task, ()):
        raise ValueError(f"expected grounding tasks of this package, which read {IMAGES}, got {task}")
    return config


def _counted(config: Mapping[str, Any], task: str) -> Mapping[str, int]:
    path, arguments = configured_place(config)
    try:
        rows = datasets.load_dataset(path, split=config["test_split"], **(arguments or {}))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the images of {task} cannot be counted: {reason}") from error
    documents = looked_up(config["process_docs"])(rows)
    return Counter(documents.image_key(number) for number in range(len(documents)))
