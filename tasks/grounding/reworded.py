"""Documents whose expressions are put differently, and how they are scored.

A document is that of its dataset with another `expression`, and beside it `original_expression` and `shifted_rate`: the
share of the split's expressions that could be put differently. The rest is not asked.
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
    """One document: which of the dataset's, and what is different in it."""

    number: int
    fields: Mapping[str, Any]


class RewordedDocs(Documents):
    """Documents of a dataset, picked and changed.

    Args:
        source: the dataset's documents.
        picks: which of them, with what changes.
        of: how many documents could have been picked at most; the share that was is in every document.
        why: what was to be done with them, for the message of the error.

    Raises:
        DatasetError: nothing was picked.
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
        """Return what documents on one photograph have in common, without looking at it."""
        return self._source.image_key(self._picks[i].number)


def shifted(source: Documents, name: str, severity: int) -> RewordedDocs:
    """Every expression under a language shift, seeded by its document's id; what cannot be shifted is left out."""
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
    """Every expression twice, as it is and changed so that it matches nothing; what cannot be changed is left out.

    Two documents stand side by side. Both have `pair` (the expression's id) and `matches`; the second has `change`.

    Args:
        source: the dataset's documents.
        name: how the change is called; the choice among candidates is seeded by it and the document's id.
        candidates: document without image → changed expressions that match nothing in its image.
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


# For a task's YAML to name.
scored_by_coordinate_mean = partial(process_results, estimator="coordinate_mean")
