"""RefCOCO+ rows (one per object) as documents (one per expression); no image is decoded before it is asked for."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from lmms_plugin.tasks.documents import IMAGE, Documents
from lmms_plugin.tasks.images import DatasetError, opened
from lmms_plugin.tasks.recent import Recent

_LIST_OF_STRINGS = "a list of strings"
_LIST_OF_NUMBERS = "a list of four numbers [x, y, width, height] in pixels"
REFCOCOPLUS_SCHEMA: Mapping[str, str] = {
    "question_id": "a string",
    IMAGE: "an image",
    "answer": _LIST_OF_STRINGS,
    "bbox": _LIST_OF_NUMBERS,
    "file_name": "a string",
}
_COCO_FILE = re.compile(r"^(COCO_\w+?_\d{12})_\d+$")


# A row's expressions are asked for one after another, by a few threads at once.
_DECODED: Recent[Image.Image] = Recent(8)


class ExpressionDocs(Documents):
    """Documents over the rows of a dataset: row r with k expressions gives k documents.

    `Dataset.select` plus `add_column` would copy every image once per expression.

    A document holds the row's columns and `expression` (str), `image_id` (str, equal for all objects of one
    photograph), `width` and `height` (pixels of the original image, read from the file header), and `image` (PIL)
    unless that column was removed.

    Raises:
        DatasetError: on construction, if a column is missing or of another type, a row has no expression, or a box is
            not four finite numbers of positive size; on access, if an image cannot be decoded or a box leaves it.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        _check_columns(rows.features)
        self._encoded = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False))
        light = [name for name in rows.column_names if name not in (IMAGE, "segmentation")]
        self._rows: list[dict[str, Any]] = rows.select_columns(light).to_list()
        self._identity = object()
        self._sizes: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(self._rows):
            _check_row(number, row)
        self._index = [(r, k) for r, row in enumerate(self._rows) for k in range(len(row["answer"]))]
        self.features = datasets.Features({name: rows.features[name] for name in light})
        self.features["expression"] = datasets.Value("string")
        self.features[IMAGE] = rows.features[IMAGE]

    def __len__(self) -> int:
        return len(self._index)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        row, which = self._index[i]
        doc = dict(self._rows[row])
        doc["expression"] = doc["answer"][which]
        doc["expression_id"] = f"{doc['question_id']}/{which}"
        doc["image_id"] = image_id(doc["file_name"])
        doc["width"], doc["height"] = self._size(row)
        return doc

    def image(self, i: int) -> Image.Image:
        """Return a document's image, decoded."""
        row = self._index[i][0]
        return _DECODED.get((self._identity, row), lambda: self._open(row, load=True))

    def image_key(self, i: int) -> str:
        """Return what documents on one photograph have in common, without looking at it."""
        return image_id(self._rows[self._index[i][0]]["file_name"])

    def _size(self, row: int) -> tuple[int, int]:
        if row not in self._sizes:
            size = self._open(row, load=False).size
            _check_inside(row, self._rows[row], size)
            self._sizes[row] = size
        return self._sizes[row]

    def _open(self, row: int, load: bool) -> Image.Image:
        where = f"row {row} ({self._rows[row]['file_name']})"
        return opened(self._encoded[row][IMAGE], where, load=load)


def image_id(file_name: str) -> str:
    """Name of the photograph a row was cut from.

    RefCOCO+ appends the number of the annotation to COCO's file name (`COCO_train2014_000000581857_16.jpg`); two rows
    on the same photograph must share seed of corruption and bootstrap cluster. Other names are taken as they are.
    """
    stem = Path(file_name).stem
    coco = _COCO_FILE.match(stem)
    return coco.group(1) if coco else stem


def _check_columns(features: datasets.Features) -> None:
    for name, expected in REFCOCOPLUS_SCHEMA.items():
        if name not in features:
            raise DatasetError(f"column {name!r} is missing: expected {expected}; the columns are {sorted(features)}")
        if not _is(features[name], expected):
            raise DatasetError(f"column {name!r}: expected {expected}, got {features[name]}")


def _is(feature: Any, expected: str) -> bool:
    if expected == "an image":
        return isinstance(feature, datasets.Image)
    if expected == "a string":
        return isinstance(feature, datasets.Value) and "string" in feature.dtype
    inner = getattr(feature, "feature", None)
    if not isinstance(inner, datasets.Value):
        return False
    return (
        ("string" in inner.dtype) if expected == _LIST_OF_STRINGS else ("float" in inner.dtype or "int" in inner.dtype)
    )


def _check_row(number: int, row: Mapping[str, Any]) -> None:
    if not row["file_name"]:
        raise DatasetError(f"row {number}: column 'file_name' is empty")
    where = f"row {number} ({row['file_name']})"
    if not row["answer"] or not all(isinstance(text, str) and text.strip() for text in row["answer"]):
        raise DatasetError(f"{where}: column 'answer' holds no expression or an empty one: {row['answer']}")
    box = row["bbox"] or []
    numbers = [value for value in box if value is not None and -1e6 < value < 1e6]
    if len(box) != 4 or len(numbers) != 4 or min(box[2], box[3]) <= 0:
        raise DatasetError(f"{where}: column 'bbox': expected {_LIST_OF_NUMBERS} of positive size, got {row['bbox']}")


def _check_inside(number: int, row: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Reject a box that leaves the image by more than rounding: a sign of xyxy order or of another scale."""
    x, y, width, height = row["bbox"]
    slack = max(2.0, 0.01 * max(size))
    if min(x, y) < -slack or x + width > size[0] + slack or y + height > size[1] + slack:
        raise DatasetError(
            f"row {number} ({row['file_name']}): column 'bbox': expected [x, y, width, height] in pixels inside the "
            f"{size[0]}x{size[1]} image, got {row['bbox']}"
        )
