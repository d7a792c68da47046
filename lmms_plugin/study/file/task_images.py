"""Images of the tasks of a study, as the tasks themselves index them, or as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from lmms_plugin.analysis.records import GROUNDING
from lmms_plugin.study.file.tasks import configured_place, known, looked_up, published_size
from lmms_plugin.tasks.registry import task_files
from lmms_plugin.utils.variables import IMAGES

_MOST_OF_MEAN = 4
"""Documents of the image with most of them, beside the mean, where they were not counted."""


class ImageCounts(NamedTuple):
    """Images of a task, and how its documents are spread over them.

    Attributes:
        images: Number of images.
        documents: Number of documents.
        largest: Largest number of documents of an image.
        sizes: Number of documents of each image; empty where they were not counted.
    """

    images: int
    documents: int
    largest: int
    sizes: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Mean number of documents of an image."""
        return self.documents / self.images

    def documents_of(self, images: int) -> int:
        """Return about how many documents a random part of the images has."""
        return round(self.mean * min(images, self.images))


def image_counts(tasks: Sequence[str]) -> ImageCounts:
    """Count the images of tasks on the same documents; those of a dataset on the hub as published, without a download.

    Args:
        tasks: Names of single tasks, at least one.

    Raises:
        ValueError: A task does not ask about parts of its images, its images are neither on this machine nor published,
            or two tasks differ in them.
    """
    found = [_counts(task, _source(sliced(task))) for task in tasks]
    for task, one in zip(tasks, found, strict=True):
        if one != found[0]:
            raise ValueError(f"expected the same documents in every task, but {task} has others than {tasks[0]}")
    return found[0]


@cache
def _counts(task: str, source: str) -> ImageCounts:
    """Count the images of a task; `source` is the key of the cache."""
    config = sliced(task)
    told = published_size(config)
    if told is not None and told.images is not None:
        return ImageCounts(told.images, told.documents, round(_MOST_OF_MEAN * told.documents / told.images))
    counted = _counted(config, task)
    sizes = tuple(sorted(counted.values()))
    return ImageCounts(len(sizes), sum(sizes), sizes[-1], sizes)


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
        config = sliced(task)
        # Corruptions and severities share rows and documents.
        source = _source(config)
        if source not in found:
            found[source] = _counted(config, task)
        first = first or (task, found[source])
        if found[source] != first[1]:
            raise ValueError(f"expected the same documents in every task, but {task} has others than {first[0]}")
    assert first is not None
    return first[1]


def expect_sliced(tasks: Iterable[str]) -> None:
    """Refuse tasks and groups that do not ask about parts of their images.

    Raises:
        ValueError: As said; names the first.
    """
    for described in known(tasks).values():
        for task in described.tasks:
            sliced(task)


def sliced(task: str) -> dict[str, Any]:
    """Return the configuration of a task that asks about parts of its images.

    Raises:
        ValueError: It does not.
    """
    source = task_files.sources().get(task)
    config = None if source is None else source.configuration
    if config is None or GROUNDING.record not in known([task])[task].metrics.get(task, ()):
        raise ValueError(f"expected grounding tasks of this package, which read {IMAGES}, got {task}")
    return config


def _source(config: Mapping[str, Any]) -> str:
    return repr((configured_place(config), config.get("test_split"), config["process_docs"]))


def _counted(config: Mapping[str, Any], task: str) -> Mapping[str, int]:
    # It takes seconds to import, which a plan of published datasets does not need.
    import datasets

    path, arguments = configured_place(config)
    try:
        rows = datasets.load_dataset(path, split=config["test_split"], **(arguments or {}))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the images of {task} cannot be counted: {reason}") from error
    documents = looked_up(config["process_docs"])(rows)
    return Counter(documents.image_key(number) for number in range(len(documents)))
