"""Documents with changed expressions, and their scoring.

A document is that of its dataset with another `expression`, and with `original_expression` and `shifted_rate`: the
share of the split's expressions that could be changed. The other expressions are not asked.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
from PIL import Image

from lmms_plugin.shifts.language import rewording
from lmms_plugin.shifts.language.mismatches import Mismatch, one_of
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.sources.documents import Documents
from lmms_plugin.utils.copies import DatasetError


class PickedExpression(NamedTuple):
    """Selection of one document of the dataset, with its changed columns."""

    number: int
    fields: Mapping[str, Any]


class RewordedDocs(Documents):
    """Documents of a dataset, selected and changed.

    Args:
        source: Documents of the dataset.
        picks: Selected documents, with their changes.
        of: Number of documents that could be selected at most; the selected share is in every document.
        why: Purpose of the selection, for the error message.

    Raises:
        DatasetError: No document was selected.
    """

    def __init__(self, source: Documents, picks: Sequence[PickedExpression], of: int, why: str) -> None:
        if not picks:
            raise DatasetError(f"expected expressions that allow {why}, got none among {of}")
        self._source = source
        self._picks = picks
        self._rate = len(picks) / of
        self.features = datasets.Features({**source.features, "original_expression": datasets.Value("string")})

    def __len__(self) -> int:
        return len(self._picks)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        number, fields = self._picks[i]
        doc = self._source.content(number)
        return {**doc, "original_expression": doc["expression"], "shifted_rate": self._rate, **fields}

    def image(self, i: int) -> Image.Image:
        """Return a document's image, decoded."""
        return self._source.image(self._picks[i].number)

    def image_key(self, i: int) -> str:
        """Return a key that documents on one photograph share, without decoding the image."""
        return self._source.image_key(self._picks[i].number)


def shifted(source: Documents, name: str, severity: int) -> RewordedDocs:
    """Apply a language shift to every expression, seeded by its document's id; unchangeable ones are left out."""
    picks = []
    for i in range(len(source)):
        doc = source.content(i)
        expression = rewording.apply(doc["expression"], name, severity, key=doc["expression_id"])
        if expression is not None:
            picks.append(PickedExpression(i, {"expression": expression}))
    return RewordedDocs(source, picks, len(source), f"{name} at severity {severity}")


def asked_both_ways(
    source: Documents, name: str, candidates: Callable[[Mapping[str, Any]], Sequence[Mismatch]]
) -> RewordedDocs:
    """Ask every expression twice, as it is and changed so that it matches nothing; unchangeable ones are left out.

    The two documents are adjacent. Both have `pair` (the expression's id) and `matches`; the second has `change`.

    Args:
        source: Documents of the dataset.
        name: Name of the change; it and the document's id seed the choice among candidates.
        candidates: Function from a document without image to changed expressions that match nothing in its image.
    """
    picks = []
    for i in range(len(source)):
        doc = source.content(i)
        pair = doc["expression_id"]
        chosen = one_of(candidates(doc), name, key=pair)
        if chosen is not None:
            change = {"kind": chosen.kind, "old": chosen.old, "new": chosen.new}
            changed = {"expression": chosen.expression, "expression_id": f"{pair}/changed", "change": change}
            picks += [
                PickedExpression(i, {"pair": pair, "matches": True}),
                PickedExpression(i, {"pair": pair, "matches": False, **changed}),
            ]
    return RewordedDocs(source, picks, 2 * len(source), name)


def process_results(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score one answer as `grounding.process_results` does, and log the original expression beside the one asked.

    `shifted_rate` is the same for all documents of a task: its mean is the share of the split that could be shifted,
    however few documents are asked.
    """
    output = comprehension.process_results(doc, results, estimator)
    record = output["mean_iou"]
    record["original_expression"] = doc["original_expression"]
    output["shifted_rate"] = {"score": doc["shifted_rate"], "image": record["image"], "id": record["id"]}
    return output


# Functions for a task's YAML.
scored_by_coordinate_mean = partial(process_results, estimator="coordinate_mean")
