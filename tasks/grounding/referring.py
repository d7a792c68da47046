"""Datasets of referring expressions with any columns: declared, validated, and converted to documents of one form.

A document is what `lmms_plugin.tasks.grounding.comprehension` scores, in RefCOCO+'s convention: `expression`,
`expression_id`, `image_id` (equal for all documents on one photograph), `width` and `height` of the original image in
pixels, `bbox` as [x, y, width, height] in its pixels (None where the expression describes nothing in the image), and
`image`. The original image is the upright one, after its EXIF orientation: boxes and sizes of every dataset are read in
that frame.
"""

import hashlib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import datasets
from loguru import logger
from PIL import Image

from lmms_plugin.tasks.grounding.strata import Strata, instances, number_in
from lmms_plugin.tasks.sources.annotations import photograph_number
from lmms_plugin.tasks.sources.conventions import Convention, numbers_in
from lmms_plugin.tasks.sources.documents import IMAGE, Documents
from lmms_plugin.tasks.sources.origins import DatasetOrigin
from lmms_plugin.tasks.sources.recent import Recent
from lmms_plugin.tasks.sources.repeats import expect_different, expect_once
from lmms_plugin.tasks.sources.row_images import content, header, opened
from lmms_plugin.utils import image_slices, variables
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.images import Header

_COCO_FILE = re.compile(r"^(COCO_\w+?_\d{12})_\d+$")
_SAMPLED = 48
_MOST_UNKNOWN = 0.05
_AS_STORED = (
    ", its size as stored, before its EXIF orientation: boxes in that frame would be scored against another picture; "
    "store the pixels upright, or remove the orientation from the file if it is wrong"
)
_STRINGS, _DISTRACTORS = "a list of strings", "a number of distractors, or a list of them"
_EXPRESSION = {"row": "a string", "expression": _STRINGS, "object": _STRINGS, "sample": _STRINGS}

# A row's expressions are requested one after another, by a few threads at once.
_DECODED: Recent[Image.Image] = Recent(8)


@dataclass(frozen=True, kw_only=True)
class ReferringSet(DatasetOrigin):
    """A dataset of referring expressions; called with its rows, it returns the documents of a task.

    Columns inside a struct, or inside the structs of a list, are named with a dot, `objects.bbox`.

    Attributes:
        expression: Column of the expression.
        box: Column of the box; a list of four numbers, or a text that holds them.
        convention: Box convention of the dataset.
        per: Unit of a row: one `expression` string and one box (`row`); a list of expressions of one box
            (`expression`); parallel lists of expressions and boxes (`object`); a list of structs, each with a list of
            expressions and their box (`sample`).
        boxes: Whether a row has a list of boxes; rows with exactly one box are documents, and rows with none are
            documents without a target.
        nothing: Column and its value that mark documents without a target, whose box is ignored.
        rejection: Whether documents without a target are kept; if not, only those with a target are documents.
        identity: Column of unique row ids; None for row numbers.
        photograph: Column that names the photograph; None for the bytes of the image.
        size: Columns of width and height in pixels, or one column of both, of the upright image.
        tags: Columns that are copied to the log of samples where present, for results by subset; those inside the
            structs of a list by their last name, from the expression's own struct.
        strata: Strata by the number of distractors; None where it is not known.
        published: Whether `lmms_plugin.tasks.sources.published_files` makes a local copy of the published files.
    """

    expression: str
    box: str
    convention: Convention
    per: Literal["row", "expression", "object", "sample"] = "row"
    boxes: bool = False
    nothing: tuple[str, Any] | None = None
    rejection: bool = False
    identity: str | None = None
    photograph: str | None = None
    size: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    strata: Strata | None = None
    published: bool = False

    def __call__(self, rows: datasets.Dataset) -> "ReferringDocs":
        """Return documents over the rows; see `ReferringDocs` for errors."""
        return ReferringDocs(self, rows)

    @property
    def wanted(self) -> str:
        """Content of a local copy, for messages to the user."""
        return f"{super().wanted} with the columns {', '.join(self.schema())}"

    @property
    def made_by(self) -> str:
        """Advice on making a local copy where the hub has none that can be loaded, for messages to the user."""
        if not self.published:
            return ""
        command = f"python -m lmms_plugin.tasks.sources.published_files {self.name} --help"
        return f"To make one of the published files: {command}"

    def schema(self) -> dict[str, str]:
        """Return the required columns and what they must hold, in words."""
        one = f"four numbers {self.convention}"
        columns = {IMAGE: "an image", self.expression: _EXPRESSION[self.per]}
        columns[self.box] = f"a list of boxes, each {one}" if self.boxes or self.per == "object" else one
        columns |= dict.fromkeys(filter(None, (self.identity, self.photograph)), "a string or an integer")
        columns |= dict.fromkeys(self.size, "an integer" if len(self.size) == 2 else "two numbers width, height")
        if self.strata is not None and self.strata.column is not None:
            columns[self.strata.column] = _DISTRACTORS
        return columns | ({self.nothing[0]: "a string, an integer or a bool"} if self.nothing else {})


class _ReferringExpression(NamedTuple):
    row: int
    which: int
    expression: str
    box: list[float] | None
    sample: int


class ReferringDocs(Documents):
    """Documents over the rows of a dataset, in the rows' order; of some images alone with `LMMS_PLUGIN_IMAGES`.

    Besides the columns of every document (see the module), a document holds the row's own columns, without lists and
    structs of its other objects, `tags` (a dictionary), and, where the number of distractors is known, `distractors`
    and `stratum` (see `lmms_plugin.tasks.grounding.strata`).

    Raises:
        DatasetError: On construction, a column is missing or of another type, a row has no expression or an empty one,
            a row occurs twice, a box is not four finite numbers of positive size, some two dozen boxes contradict the
            declared scale, or more than 5 % of the boxes are not in COCO's annotations of their photographs, where
            these are given; on access, an image cannot be decoded or differs from its stated size, or a box leaves
            it. Names the row, the column and what was found there.
    """

    def __init__(self, source: ReferringSet, rows: datasets.Dataset) -> None:
        _check_columns(source, rows.features)
        self._source = source
        self._identity = object()
        self._encoded = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False))
        light = [name for name in rows.column_names if name not in (IMAGE, "segmentation")]
        self._rows: list[dict[str, Any]] = rows.select_columns(light).to_list()
        self._sizes: dict[int, tuple[int, int]] = {}
        self._keys: dict[int, str] = {}
        self._places = [place for row in range(len(self._rows)) for place in self._places_of(row)]
        if not self._places:
            raise DatasetError(f"{source.place()}: none of {len(self._rows)} rows makes a document")
        self._check_once()
        parts = (source.expression, source.box) if source.per in ("object", "sample") else ()
        lists = {column.split(".")[0] for column in parts}
        self._light = [name for name in light if name not in lists]
        self.features = datasets.Features({name: rows.features[name] for name in self._light})
        self.features["expression"] = datasets.Value("string")
        self.features[IMAGE] = rows.features[IMAGE]
        self._check_reach()
        self._distractors = self._counted()
        self._keep_asked()

    def __len__(self) -> int:
        return len(self._places)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        place = self._places[i]
        row = self._rows[place.row]
        doc = {name: row[name] for name in self._light}
        doc["expression"] = place.expression
        name = str(_value(row, self._source.identity)) if self._source.identity else str(place.row)
        doc["expression_id"] = name if self._source.per == "row" else f"{name}/{place.which}"
        doc["image_id"] = self.image_key(i)
        doc["width"], doc["height"] = size = self._size(place.row)
        doc["bbox"] = None if place.box is None else self._pixels(place, size)
        doc["tags"] = dict(self._tags(place))
        if (number := self._distractors.get(place[:2])) is not None and self._source.strata is not None:
            doc["distractors"], doc["stratum"] = number, self._source.strata.of(number)
        return doc

    def image(self, i: int) -> Image.Image:
        """Return a document's image, decoded."""
        row = self._places[i].row
        return _DECODED.get((self._identity, row), lambda: opened(*self._encoded_image(row)))

    def image_key(self, i: int) -> str:
        """Return a key that documents on one photograph share, without decoding the image."""
        row = self._places[i].row
        if self._source.photograph:
            return image_id(str(_value(self._rows[row], self._source.photograph)))
        if row not in self._keys:
            self._keys[row] = hashlib.blake2b(content(*self._encoded_image(row)), digest_size=16).hexdigest()
        return self._keys[row]

    def _places_of(self, number: int) -> Iterator[_ReferringExpression]:
        source, row = self._source, self._rows[number]
        if source.photograph and _value(row, source.photograph) in (None, ""):
            where = source.row(self._encoded, number)
            raise DatasetError(f"{where}: column {source.photograph!r} is empty")
        texts, boxes = self._texts(number), self._boxes(number)
        if boxes is None:
            return
        if source.per == "object" and len(texts) != len(boxes):
            raise DatasetError(
                f"{self._where(number)}: expected as many boxes in column {source.box!r} as expressions in column "
                f"{source.expression!r}, got {len(boxes)} and {len(texts)}"
            )
        samples = self._samples(number, texts)
        for which, text in enumerate(texts):
            box = boxes[samples[which]]
            numbers = None if box is None else self._numbers(number, box)
            yield _ReferringExpression(number, which, text, numbers, samples[which])

    def _samples(self, number: int, texts: Sequence[str]) -> Sequence[int]:
        """Return which box of a row belongs to each of its expressions."""
        per = self._source.per
        if per == "sample":
            said = _value(self._rows[number], self._source.expression)
            return [k for k, sentences in enumerate(said) for _ in sentences]
        return range(len(texts)) if per == "object" else [0] * len(texts)

    def _tags(self, place: _ReferringExpression) -> Iterator[tuple[str, Any]]:
        row = self._rows[place.row]
        for tag in self._source.tags:
            first, _, rest = tag.partition(".")
            if first in row:
                yield (rest, row[first][place.sample].get(rest)) if rest else (tag, row[tag])

    def _counted(self) -> dict[tuple[int, int], int]:
        """Return the number of distractors of expressions, by row and place in it, where it is known.

        Raises:
            DatasetError: A column holds no number, or COCO's annotations are not those of these photographs.
        """
        strata = self._source.strata
        if strata is None:
            return {}
        if strata.column is not None:
            return {place[:2]: self._noted(place.row, strata.column) for place in self._places}
        objects = instances()
        photographs = {} if objects is None else {i: photograph_number(self.image_key(i)) for i in range(len(self))}
        named = [(self._places[i], number) for i, number in photographs.items() if number is not None]
        if objects is None or not named:
            return {}
        found = {place[:2]: objects.distractors(number, place.box or []) for place, number in named}
        unknown = [place for place, _ in named if found[place[:2]] is None]
        if len(unknown) > _MOST_UNKNOWN * len(named):
            raise DatasetError(
                f"{objects.path}: expected the objects of {self._source.title}, but of {len(named)} expressions "
                f"{len(unknown)} have a box that is none of them, e.g. {self._where(unknown[0].row)}: {unknown[0].box}"
            )
        return {key: number for key, number in found.items() if number is not None}

    def _noted(self, number: int, column: str) -> int:
        try:
            return number_in(_value(self._rows[number], column))
        except ValueError as error:
            raise DatasetError(f"{self._where(number)}: column {column!r}: {error}") from error

    def _texts(self, number: int) -> list[str]:
        source = self._source
        written = _value(self._rows[number], source.expression)
        texts = [written] if source.per == "row" else written
        if source.per == "sample":
            if not all(texts):
                raise DatasetError(f"{self._where(number)}: column {source.expression!r} holds an object without any")
            texts = [text for sentences in texts for text in sentences]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DatasetError(
                f"{self._where(number)}: column {source.expression!r} holds no expression or an empty one: {written}"
            )
        return list(texts)

    def _boxes(self, number: int) -> list[Any] | None:
        """Return boxes as written; [None] without a target, None where the row is not a document."""
        source, row = self._source, self._rows[number]
        written = _value(row, source.box)
        nothing = source.nothing and _value(row, source.nothing[0]) == source.nothing[1]
        if nothing or (source.boxes and not written):
            return [None] if source.rejection else None
        boxes = written or [] if source.boxes or source.per in ("object", "sample") else [written]
        # None stands for no target; a missing box fails the check for four numbers.
        return None if source.boxes and len(boxes) != 1 else [[] if box is None else box for box in boxes]

    def _numbers(self, number: int, written: Any) -> list[float]:
        try:
            return self._source.convention.numbers(written)
        except ValueError as error:
            raise DatasetError(f"{self._where(number)}: column {self._source.box!r}: {error}") from error

    def _pixels(self, place: _ReferringExpression, size: tuple[int, int]) -> list[float]:
        try:
            return self._source.convention.pixels(place.box or [], size)
        except ValueError as error:
            raise DatasetError(f"{self._where(place.row)}: column {self._source.box!r}: {error}") from error

    def _check_once(self) -> None:
        source = self._source
        if source.identity:
            expect_once(source.place(), source.identity, (_value(row, source.identity) for row in self._rows))
        said: list[tuple[Hashable, ...] | None] = [None] * len(self._rows)
        for place in self._places:
            box = None if place.box is None else tuple(place.box)
            said[place.row] = (*(said[place.row] or ()), place.expression, box)
        names = [image_id(str(_value(row, source.photograph))) for row in self._rows] if source.photograph else None
        what = "photograph, expression and box"
        expect_different(source.place(), what, said, self._encoded, self._where, names)

    def _keep_asked(self) -> None:
        """Leave out documents of images that `LMMS_PLUGIN_IMAGES` does not ask about."""
        try:
            asked = image_slices.asked()
        except ValueError as error:
            raise DatasetError(str(error)) from error
        if asked is None:
            return
        keys = [self.image_key(i) for i in range(len(self._places))]
        chosen = asked.of(keys)
        if not chosen:
            told = f"expected places among {len(set(keys))} images of {self._source.place()}, got none of them"
            raise DatasetError(f"{variables.IMAGES}={asked}: {told}")
        self._places = [place for place, key in zip(self._places, keys, strict=True) if key in chosen]
        logger.warning("{}={}: {} of {} images are asked about", variables.IMAGES, asked, len(chosen), len(set(keys)))

    def _check_reach(self) -> None:
        boxes = [place for place in self._places if place.box is not None]
        sampled = boxes[:: max(1, len(boxes) // _SAMPLED)]
        in_images = [(place.box or [], self._size(place.row)) for place in sampled]
        try:
            self._source.convention.reach(in_images)
        except ValueError as error:
            raise DatasetError(f"{self._source.place()}: column {self._source.box!r}: {error}") from error

    def _size(self, number: int) -> tuple[int, int]:
        if number not in self._sizes:
            found = header(*self._encoded_image(number))
            self._check_size(number, found)
            self._sizes[number] = found.size
        return self._sizes[number]

    def _check_size(self, number: int, found: Header) -> None:
        columns = self._source.size
        noted = [_value(self._rows[number], column) for column in columns]
        sides = numbers_in(noted[0]) if len(noted) == 1 else noted
        if noted and tuple(sides) != found.size:
            as_stored = found.turned and tuple(sides) == found.size[::-1]
            raise DatasetError(
                f"{self._where(number)}: column {' and '.join(map(repr, columns))}: expected {found.size[0]} and "
                f"{found.size[1]}, the image's size{' upright' if found.turned else ''}, got "
                f"{' and '.join(map(str, noted))}{_AS_STORED if as_stored else ''}"
            )

    def _encoded_image(self, number: int) -> tuple[Any, str]:
        return self._encoded[number][IMAGE], self._where(number)

    def _where(self, number: int) -> str:
        known_by = self._source.photograph or self._source.identity
        name = _value(self._rows[number], known_by) if known_by else None
        return self._source.row(self._encoded, number, name)


def image_id(file_name: str) -> str:
    """Return the name of the photograph a row was cut from.

    RefCOCO+ appends the number of the annotation to COCO's file name (`COCO_train2014_000000581857_16.jpg`); two rows
    on the same photograph must share seed of corruption and bootstrap cluster. Other names are kept, with their folder.
    """
    path = PurePath(file_name)
    coco = _COCO_FILE.match(path.stem)
    return coco.group(1) if coco else str(path.with_suffix(""))


def _value(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = [one[part] for one in value] if isinstance(value, list) else value[part]
    return value


def _check_columns(source: ReferringSet, features: datasets.Features) -> None:
    for column, expected in source.schema().items():
        feature: Any = features
        for part in column.split("."):
            feature = feature.feature if isinstance(feature, datasets.List) else feature
            if not isinstance(feature, Mapping) or part not in feature:
                known = sorted(feature) if isinstance(feature, Mapping) else feature
                raise DatasetError(
                    f"{source.place()}: column {column!r} is missing: expected {expected}; the columns are {known}"
                )
            feature = feature[part]
        if not _is(feature, expected):
            raise DatasetError(f"{source.place()}: column {column!r}: expected {expected}, got {feature}")


def _is(feature: Any, expected: str) -> bool:
    if expected == "an image":
        return isinstance(feature, datasets.Image)
    if expected == _DISTRACTORS:
        return _is(feature, "a string or an integer") or isinstance(feature, datasets.List)
    if expected.startswith("a list of boxes"):
        return _is(getattr(feature, "feature", None), "four numbers")
    if expected == "a list of strings":
        return _is(getattr(feature, "feature", None), "a string")
    if expected.startswith(("four numbers", "two numbers")):
        inner = getattr(feature, "feature", None)
        return _is(feature, "a string") or _dtype(inner).startswith(("float", "int", "uint", "double"))
    kinds = {"a string": ("string", "large_string"), "an integer": ("int", "uint"), "a bool": ("bool",)}
    wanted = [prefix for kind, prefixes in kinds.items() if kind in expected for prefix in prefixes]
    return _dtype(feature).startswith(tuple(wanted))


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else ""
