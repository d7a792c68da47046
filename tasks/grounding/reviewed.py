"""RefCOCO+ with the annotation errors that reviewers found: metrics over all expressions, and over correct ones.

The authors of Ref-L4 (arXiv 2406.16866) read all expressions of RefCOCO+'s val, testA and testB, and call 24 % of them
wrong: they fit several objects or none, or the box is off. Their files, `refcoco+_testA_reviewed.json` and so on, are
in COCO's form with one entry of `images` per expression:

    images       id, original_id (COCO's number of the photograph), caption
    annotations  image_id (the entry of `images`), bbox ([x, y, width, height] in pixels), caption_quality (0: wrong)

They are in the folder `refcocos_annotation_reviewed` of the hub's JierunChen/Ref-L4; `LMMS_PLUGIN_REFCOCOPLUS_REVIEWED`
names a local folder of them. A review belongs to an expression with the same words on the same box of the same
photograph.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.referring import image_id
from lmms_plugin.tasks.sources.annotations import entries, photograph_number, read, same_box
from lmms_plugin.utils.copies import AbsentSplitError, DatasetError, local_folder

VARIABLE = "LMMS_PLUGIN_REFCOCOPLUS_REVIEWED"
HUB_ID, HUB_FOLDER = "JierunChen/Ref-L4", "refcocos_annotation_reviewed"
CLEAN = ("acc@0.5", "acc@0.75", "acc@0.9", "mean_iou", "parse_rate", "ece", "ace", "brier", "auroc")
"""Metrics that are also computed over the expressions without an error, as `acc@0.5_clean`."""
_FIELDS = {"images": ("id", "original_id", "caption"), "annotations": ("image_id", "bbox", "caption_quality")}
_MOST_UNREVIEWED = 0.05

Box = Sequence[float]


class Review:
    """Reviews of the expressions of a split.

    Args:
        path: One of the reviewers' files.

    Raises:
        DatasetError: The file is not in their form.
    """

    def __init__(self, path: Path) -> None:
        content = read(path)
        images, annotations = (entries(path, key, fields, content) for key, fields in _FIELDS.items())
        expressions = {entry["id"]: entry for entry in images}
        self._said: defaultdict[int, list[tuple[Box, str, bool]]] = defaultdict(list)
        for entry in annotations:
            if entry["caption_quality"] not in (0, 1):
                raise DatasetError(f"{path}: expected 'caption_quality' 0 or 1, got {entry['caption_quality']!r}")
            expression = expressions.get(entry["image_id"])
            if expression is None:
                raise DatasetError(
                    f"{path}: 'annotations' refer to {entry['image_id']!r}, which is no 'id' of 'images'"
                )
            said = (entry["bbox"], _words(expression["caption"]), bool(entry["caption_quality"]))
            self._said[int(expression["original_id"])].append(said)

    def __len__(self) -> int:
        """Return the number of reviewed expressions."""
        return sum(map(len, self._said.values()))

    def clean(self, photograph: int, box: Box, expression: str) -> bool | None:
        """Return whether an expression is without an error; None if it was not reviewed.

        Args:
            photograph: COCO's number of the photograph.
            box: Box as [x, y, width, height] in pixels.
            expression: Words of the expression; letter case and punctuation do not count.
        """
        words = _words(expression)
        found = [good for other, text, good in self._said[photograph] if text == words and same_box(box, other)]
        return all(found) if found else None


class ReviewedDocs(ExpressionDocs):
    """RefCOCO+'s documents, each with `clean`: see `Review.clean`.

    Raises:
        DatasetError: As `ReferringDocs`, or more than 5 % of the expressions were not reviewed.
    """

    def __init__(self, rows: datasets.Dataset, path: Path) -> None:
        super().__init__(rows)
        review = Review(path)
        self._clean = []
        for place in self._places:
            name = self._rows[place.row]["file_name"]
            self._clean.append(review.clean(_photograph(name), place.box or [], place.expression))
        unreviewed = [place for place, clean in zip(self._places, self._clean, strict=True) if clean is None]
        if len(unreviewed) > _MOST_UNREVIEWED * len(self):
            first = unreviewed[0]
            raise DatasetError(
                f"{path}: expected a review of the expressions of RefCOCO+, found none of {len(unreviewed)} of "
                f"{len(self)}, e.g. {first.expression!r} on {self._rows[first.row]['file_name']}, box {first.box}"
            )

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        return {**super().content(i), "clean": self._clean[i]}


@dataclass(frozen=True)
class Reviewed:
    """Factory of the documents of a split, for a task's `process_docs`."""

    split: str

    def __call__(self, rows: datasets.Dataset) -> ReviewedDocs:
        """Return documents in the dataset's order."""
        return ReviewedDocs(rows, self.file())

    def file(self) -> Path:
        """Return the reviewers' file, from the folder that `VARIABLE` names or from the hub.

        Raises:
            DatasetError: It does not exist, or the hub cannot be reached.
        """
        name = f"refcoco+_{self.split}_reviewed.json"
        folder = local_folder(VARIABLE, f"Set it to a folder that holds {name}.")
        if folder is not None:
            path = folder / name
            if not path.is_file():
                found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
                raise AbsentSplitError(f"{VARIABLE}={folder}: expected {name}, found {found}")
            return path
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(HUB_ID, f"{HUB_FOLDER}/{name}", repo_type="dataset"))
        except (OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DatasetError(
                f"cannot load {HUB_FOLDER}/{name} of {HUB_ID}: {reason}. To use a local copy, set {VARIABLE} to a "
                f"folder that holds {name}."
            ) from error


def process_results(doc: Mapping[str, Any], results: Sequence[str], estimator: str) -> dict[str, Any]:
    """Score as `grounding.process_results`, and repeat its metrics for expressions without an error.

    `clean_rate` is the share of correct expressions among the reviewed, `reviewed_rate` that of the reviewed among all.
    """
    output = comprehension.process_results(doc, results, estimator)
    record, clean = output["mean_iou"], doc["clean"]
    record["tags"] = {"clean": clean}
    identity = {"image": record["image"], "id": record["id"]}
    again = {f"{name}_clean": output[name] for name in CLEAN if name in output} if clean else {}
    if clean:
        again["mean_iou_clean"] = {"score": record["score"], **identity}
    if clean is not None:
        again["clean_rate"] = {"score": float(clean), **identity}
    return {**output, **again, "reviewed_rate": {"score": float(clean is not None), **identity}}


def _photograph(file_name: str) -> int:
    number = photograph_number(image_id(file_name))
    if number is None:
        raise DatasetError(f"column 'file_name': expected COCO's name of a photograph, got {file_name!r}")
    return number


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


# Functions for a task's YAML.
scored_by_coordinate_mean = partial(process_results, estimator="coordinate_mean")
val = Reviewed("val")
testA = Reviewed("testA")
testB = Reviewed("testB")
