"""RefCOCO+ with what reviewers found wrong: every number over all expressions, and over those without an error.

The authors of Ref-L4 (arXiv 2406.16866) read all expressions of RefCOCO+'s val, testA and testB, and call 24 % of them
wrong: they fit several objects or none, or the box is off. Their files, `refcoco+_testA_reviewed.json` and so on, are
COCO's form with one entry of `images` per expression:

    images       id, original_id (COCO's number of the photograph), caption
    annotations  image_id (the entry of `images`), bbox ([x, y, width, height] in pixels), caption_quality (0: wrong)

They lie in the folder `refcocos_annotation_reviewed` of the hub's JierunChen/Ref-L4; `LMMS_PLUGIN_REFCOCOPLUS_REVIEWED`
names a local folder of them. A review is that of the same words on the same box of the same photograph.
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
from lmms_plugin.tasks.sources.annotations import entries, read
from lmms_plugin.utils.copies import AbsentSplitError, DatasetError, local_folder

VARIABLE = "LMMS_PLUGIN_REFCOCOPLUS_REVIEWED"
HUB_ID, HUB_FOLDER = "JierunChen/Ref-L4", "refcocos_annotation_reviewed"
CLEAN = ("acc@0.5", "acc@0.75", "acc@0.9", "mean_iou", "parse_rate", "ece", "ace", "brier", "auroc")
"""The metrics that are also taken over the expressions without an error, as `acc@0.5_clean`."""
_FIELDS = {"images": ("id", "original_id", "caption"), "annotations": ("image_id", "bbox", "caption_quality")}
_MOST_UNREVIEWED = 0.05
_SAME_BOX = 0.5
_PHOTOGRAPH = re.compile(r"_(\d{12})$")

Box = Sequence[float]


class Review:
    """What the reviewers said of the expressions of a split.

    Args:
        path: one of their files.

    Raises:
        DatasetError: the file is not in their form.
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
        """Number of expressions that were reviewed."""
        return sum(map(len, self._said.values()))

    def clean(self, photograph: int, box: Box, expression: str) -> bool | None:
        """Whether an expression is without an error; None if it was not reviewed.

        Args:
            photograph: COCO's number.
            box: [x, y, width, height] in pixels.
            expression: its words; letter case and punctuation do not count.
        """
        words = _words(expression)
        found = [good for other, text, good in self._said[photograph] if text == words and _same(box, other)]
        return all(found) if found else None


class ReviewedDocs(ExpressionDocs):
    """RefCOCO+'s documents, each with `clean`: see `Review.clean`.

    Raises:
        DatasetError: as `ReferringDocs`, or if more than 5 % of the expressions were not reviewed.
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
    """Makes the documents of a split, for a task's `process_docs`."""

    split: str

    def __call__(self, rows: datasets.Dataset) -> ReviewedDocs:
        """Documents in the dataset's order."""
        return ReviewedDocs(rows, self.file())

    def file(self) -> Path:
        """The reviewers' file, from the folder that `VARIABLE` names or from the hub.

        Raises:
            DatasetError: it is not there, or the hub cannot be reached.
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
    """As `grounding.process_results`, and its metrics again for expressions without an error.

    `clean_rate` is the share of those among the reviewed, `reviewed_rate` that of the reviewed among all.
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
    found = _PHOTOGRAPH.search(image_id(file_name))
    if found is None:
        raise DatasetError(f"column 'file_name': expected COCO's name of a photograph, got {file_name!r}")
    return int(found.group(1))


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _same(box: Box, other: Box) -> bool:
    return len(box) == len(other) and all(abs(a - b) <= _SAME_BOX for a, b in zip(box, other, strict=True))


# For a task's YAML to name.
scored_by_coordinate_mean = partial(process_results, estimator="coordinate_mean")
val = Reviewed("val")
testA = Reviewed("testA")
testB = Reviewed("testB")
