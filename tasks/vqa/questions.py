"""Questions about photographs as documents, parted by photograph, and mixtures of two datasets.

Columns, as on the hub:

=============  =====================================  ==============================
column         VQAv2, AdVQA                           VizWiz-VQA
=============  =====================================  ==============================
question_id    integer or string                      string, one per photograph
image_id       integer: COCO's number                 none
image          image                                  image
question       string                                 string
answers        list of structs with string `answer`   list of strings
=============  =====================================  ==============================

Parts follow Reliable VQA (Whitehead et al., ECCV 2022): 40 % of the photographs are for training (`dev`), 10 % for
choosing thresholds (`val`), 50 % for reporting (`test`), every question of a photograph in the same part. There a
shuffled list is cut; here a hash of the photograph's number and `SEED` decides, so that a photograph's part depends on
nothing else: it is the same in VQAv2 and AdVQA, which share photographs, and in a copy that holds a few rows. Shares
are met up to chance (± 0.25 % of VQAv2's photographs), and the parts are not those of the published files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lmms_plugin.tasks.sources.documents import IMAGE, Documents
from lmms_plugin.tasks.sources.recent import Recent
from lmms_plugin.tasks.sources.repeats import expect_different, expect_once
from lmms_plugin.tasks.sources.row_images import opened
from lmms_plugin.tasks.vqa.datasets import SOURCES, VqaDataset
from lmms_plugin.utils.chance import uniform
from lmms_plugin.utils.copies import DatasetError

SEED = 1234
PARTS: Mapping[str, float] = {"dev": 0.4, "val": 0.1, "test": 0.5}
_ANSWERS = {True: "a list of structs with the field 'answer', a string", False: "a list of strings"}

# The questions about a photograph are asked one after another, by a few threads at once.
_DECODED: Recent[Image.Image] = Recent(8)


def part_of(image_id: str) -> str:
    """The part that a photograph belongs to."""
    position, end = _fraction("part", image_id), 0.0
    for part, share in PARTS.items():
        end += share
        if position < end:
            return part
    return part


def _fraction(purpose: str, key: str) -> float:
    return uniform(f"{SEED}/{purpose}/{key}")


class PickedQuestion(NamedTuple):
    """A document: which table, which of its rows."""

    table: int
    row: int


class Questions:
    """The checked rows of one dataset; no image is decoded before it is asked for.

    Attributes:
        source: the dataset.
        image_ids: shape (rows,), of each row its photograph, equal across datasets of the same photographs.
        question_ids: shape (rows,), unique across datasets.

    Raises:
        DatasetError: on construction, if a column is missing or of another type, a question is there twice, or a row
            has no question or fewer than two answers; on access, if an image cannot be decoded.
    """

    def __init__(self, source: VqaDataset, rows: datasets.Dataset) -> None:
        _check_columns(source, rows.features)
        self.source = source
        self._identity = object()
        self._encoded = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False))
        self._light = rows.select_columns(["question", "answers"])
        _check_rows(source, self._light)
        keys = rows.select_columns(list({"question_id", source.image_column})).with_format("arrow")[:]
        expect_once(source.place(), "question_id", keys["question_id"].to_pylist())
        photographs = None if source.image_column == "question_id" else keys[source.image_column].to_pylist()
        said = list(zip(self._light["question"], _joined(self._light), strict=True))
        what = "photograph, question and answers"
        expect_different(source.place(), what, said, self._encoded, self._numbered, photographs)
        self.question_ids = [f"{source.name}/{key}" for key in keys["question_id"].to_pylist()]
        self.image_ids = [f"{source.photographs}/{key}" for key in keys[source.image_column].to_pylist()]

    def picks(self, table: int, parts: Sequence[str]) -> list[PickedQuestion]:
        """The rows of some parts, in the dataset's order."""
        return [PickedQuestion(table, row) for row, image in enumerate(self.image_ids) if part_of(image) in parts]

    def document(self, row: int) -> dict[str, Any]:
        """A row without its image."""
        content = self._light[row]
        answers = [answer["answer"] for answer in content["answers"]] if self.source.structured else content["answers"]
        if not all(isinstance(answer, str) for answer in answers):
            raise DatasetError(f"{self._where(row)}: column 'answers': expected strings, got {answers}")
        return {
            "dataset": self.source.name,
            "question_id": self.question_ids[row],
            "image_id": self.image_ids[row],
            "part": part_of(self.image_ids[row]),
            "question": content["question"],
            "answers": answers,
        }

    def image(self, row: int) -> Image.Image:
        """The decoded photograph."""
        key = (self._identity, self.image_ids[row])
        return _DECODED.get(key, lambda: opened(self._encoded[row][IMAGE], self._where(row)))

    def _where(self, row: int) -> str:
        return self.source.row(self._encoded, row, self.question_ids[row])

    def _numbered(self, row: int) -> str:
        return self.source.row(self._encoded, row)


class QuestionDocs(Documents):
    """Documents over rows of one or more datasets.

    A document holds `dataset`, `question_id`, `image_id`, `part`, `question` (all strings), `answers` (what people
    said, a list of strings), and `image` (PIL) unless that column was removed.
    """

    features = datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("dataset", "question_id", "image_id", "part", "question")},
            "answers": datasets.List(datasets.Value("string")),
            IMAGE: datasets.Image(),
        }
    )

    def __init__(self, tables: Sequence[Questions], picks: Sequence[PickedQuestion]) -> None:
        self._tables = tables
        self._picks = picks

    def __len__(self) -> int:
        return len(self._picks)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        table, row = self._picks[i]
        return self._tables[table].document(row)

    def image(self, i: int) -> Image.Image:
        """Return a document's image, decoded."""
        table, row = self._picks[i]
        return self._tables[table].image(row)

    def image_key(self, i: int) -> str:
        """Return what documents on one photograph have in common, without looking at it."""
        table, row = self._picks[i]
        return self._tables[table].image_ids[row]


@dataclass(frozen=True)
class Parts:
    """Makes the documents of one dataset, for a task's `process_docs`.

    Attributes:
        dataset: name of the source.
        parts: which of `PARTS`; by default all but that for training.
    """

    dataset: str
    parts: tuple[str, ...] = ("val", "test")

    def __call__(self, rows: datasets.Dataset) -> QuestionDocs:
        """Questions in the dataset's order."""
        questions = Questions(SOURCES[self.dataset], rows)
        return QuestionDocs([questions], questions.picks(0, self.parts))


@dataclass(frozen=True)
class Mixture:
    """Makes the documents of a mixture of VQAv2 with another dataset, for the `process_docs` of a task on VQAv2.

    Thresholds are chosen on VQAv2 (its part `val`, whole), whatever the mixture; the part `test` holds `per_shifted`
    questions of VQAv2 for each of the other dataset, as many as both have, chosen by a hash of their identifier and
    `SEED`: questions of a mixture with less of VQAv2 are among those of one with more. 9, 2, 1 and 1/2 questions of
    VQAv2 per question of AdVQA are the mixtures with 10, 33, 50 and 67 % of Dancette et al. (CVPR 2023). Documents
    stand in a random order of photographs, so that the first few are a mixture, too.

    Attributes:
        shifted: name of the other source.
        per_shifted: questions of VQAv2 per question of the other dataset.
    """

    shifted: str
    per_shifted: float

    def __call__(self, rows: datasets.Dataset) -> QuestionDocs:
        """Questions of both datasets."""
        source = SOURCES[self.shifted]
        tables = [Questions(SOURCES["vqav2"], rows), Questions(source, source.load())]
        usual, shifted = (table.picks(number, ["test"]) for number, table in enumerate(tables))
        most = int(len(usual) / self.per_shifted) if self.per_shifted else len(shifted)
        shifted = _some(tables, shifted, min(len(shifted), most))
        usual = _some(tables, usual, round(self.per_shifted * len(shifted)))
        picks = [*tables[0].picks(0, ["val"]), *usual, *shifted]
        return QuestionDocs(tables, sorted(picks, key=lambda pick: _place(tables[pick.table].image_ids[pick.row])))


def _place(image_id: str) -> tuple[float, str]:
    return _fraction("order", image_id), image_id


def _some(tables: Sequence[Questions], picks: Sequence[PickedQuestion], count: int) -> list[PickedQuestion]:
    by_chance = sorted(picks, key=lambda pick: _fraction("mixture", tables[pick.table].question_ids[pick.row]))
    return by_chance[:count]


# For a task's YAML to name.
vqav2 = Parts("vqav2")
advqa = Parts("advqa")
vizwiz = Parts("vizwiz")
vqav2_dev = Parts("vqav2", ("dev",))
advqa_dev = Parts("advqa", ("dev",))
vizwiz_dev = Parts("vizwiz", ("dev",))
advqa_10 = Mixture("advqa", 9.0)
advqa_33 = Mixture("advqa", 2.0)
advqa_50 = Mixture("advqa", 1.0)
advqa_67 = Mixture("advqa", 0.5)
advqa_100 = Mixture("advqa", 0.0)
vizwiz_100 = Mixture("vizwiz", 0.0)
MIXTURES: Mapping[str, Mixture] = {
    "advqa_10": advqa_10,
    "advqa_33": advqa_33,
    "advqa_50": advqa_50,
    "advqa_67": advqa_67,
    "advqa_100": advqa_100,
    "vizwiz_100": vizwiz_100,
}
"""Mixtures by the other dataset and its percentage of the questions."""


def _check_columns(source: VqaDataset, features: datasets.Features) -> None:
    expected = {"question_id": "a string or an integer", source.image_column: "a string or an integer"}
    expected |= {IMAGE: "an image", "question": "a string", "answers": _ANSWERS[source.structured]}
    for name, kind in expected.items():
        if name not in features:
            raise DatasetError(
                f"{source.place()}: column {name!r} is missing: expected {kind}; the columns are {sorted(features)}"
            )
        if not _is(features[name], kind):
            raise DatasetError(f"{source.place()}: column {name!r}: expected {kind}, got {features[name]}")


def _is(feature: Any, kind: str) -> bool:
    if kind == "an image":
        return isinstance(feature, datasets.Image)
    if kind.startswith("a list"):
        inner = getattr(feature, "feature", None)
        if kind == _ANSWERS[True]:
            return isinstance(inner, Mapping) and _is(inner.get("answer"), "a string")
        return _is(inner, "a string")
    if not isinstance(feature, datasets.Value):
        return False
    return "string" in feature.dtype or (kind != "a string" and "int" in feature.dtype)


def _joined(light: datasets.Dataset) -> list[str | None]:
    """Of each row its answers as one text; None where one is missing."""
    answers = light.with_format("arrow")[:]["answers"]
    lengths = pc.fill_null(pc.list_value_length(answers), 0).to_numpy()
    flat = pc.list_flatten(answers)
    texts = pc.struct_field(flat, "answer") if pa.types.is_struct(flat.type) else flat
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    lists = pa.LargeListArray.from_arrays(offsets, pa.concat_arrays(texts.chunks))
    joined: list[str | None] = pc.binary_join(lists, "\n").to_pylist()
    return joined


def _check_rows(source: VqaDataset, light: datasets.Dataset) -> None:
    columns = light.with_format("arrow")[:]
    counts = pc.fill_null(pc.list_value_length(columns["answers"]), 0).to_numpy()
    few = np.flatnonzero(counts < 2)
    if few.size:
        raise DatasetError(
            f"{source.row(light, few[0])}: column 'answers': expected the answers of several people, got "
            f"{light[int(few[0])]['answers']} ({few.size} such rows); is this a split without answers?"
        )
    for row, question in enumerate(columns["question"].to_pylist()):
        if not question or not question.strip():
            raise DatasetError(f"{source.row(light, row)}: column 'question' is empty")
