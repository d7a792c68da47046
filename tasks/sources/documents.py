"""Documents that stand where lmms-eval expects a `datasets.Dataset`, without a copy of each image per document."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import datasets
from PIL import Image

from lmms_plugin.ending import ends_the_command
from lmms_plugin.utils.copies import DatasetError

IMAGE = "image"


class Documents(Sequence[dict[str, Any]], ABC):
    """Documents of which no image is decoded before it is asked for.

    Offers the members of a `datasets.Dataset` that the harness uses: `features`, `column_names`, `remove_columns`,
    length, indexing, slices, iteration.

    Attributes:
        features: columns of a document and their types; the image is one of them unless it was removed.
    """

    features: datasets.Features

    @property
    def column_names(self) -> list[str]:
        """Names of the columns a document has."""
        return list(self.features)

    def remove_columns(self, names: str | list[str]) -> Self:
        """The same documents without their image; no other column can be removed."""
        if set([names] if isinstance(names, str) else names) != {IMAGE}:
            raise ValueError(f"only {IMAGE!r} can be removed, got {names!r}")
        view = copy.copy(self)
        view.features = datasets.Features({name: value for name, value in self.features.items() if name != IMAGE})
        return view

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return Walk(self)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        # The harness asks for documents while it runs, when it makes nothing of errors but a traceback.
        with ends_the_command((DatasetError,)):
            doc = self.content(i)
            if IMAGE in self.features:
                doc[IMAGE] = self.image(i)
            return doc

    @abstractmethod
    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Return a document's image, decoded."""

    @abstractmethod
    def image_key(self, i: int) -> str:
        """Return what documents on one photograph have in common, without looking at it."""


class Walk(Iterator[dict[str, Any]]):
    """One pass over documents.

    Attributes:
        documents: what is walked over; `lmms_plugin.vlm.running.sharding` asks for it.
    """

    def __init__(self, documents: Sequence[dict[str, Any]]) -> None:
        self.documents = documents
        self._numbers = iter(range(len(documents)))

    def __next__(self) -> dict[str, Any]:
        return self.documents[next(self._numbers)]
