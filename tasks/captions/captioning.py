"""COCO captions: documents, and the metrics of the COCO caption evaluation with intervals over photographs.

Captions are tokenized by Stanford's PTB tokenizer and scored by `pycocoevalcap`, as everywhere; tokenizer and METEOR
are Java programs. Without Java the task refuses to start: another tokenizer would give other numbers under the same
names.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from lmms_plugin.confidence.estimators import TEXT_ESTIMATORS, Evidence, estimate_all
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.retrieval.matching import REQUEST, bounds, check_columns
from lmms_plugin.tasks.sources.documents import IMAGE, Documents
from lmms_plugin.tasks.sources.origins import DatasetOrigin
from lmms_plugin.tasks.sources.recent import Recent
from lmms_plugin.tasks.sources.repeats import expect_different, expect_once
from lmms_plugin.tasks.sources.row_images import opened
from lmms_plugin.utils.copies import DatasetError

METRICS = ("CIDEr", "METEOR", "Bleu_4", "ROUGE_L")
_EXPECTED = {IMAGE: "an image", "question_id": "a string", "answer": "a list of strings"}

_DECODED: Recent[Image.Image] = Recent(8)

doc_to_visual = comprehension.doc_to_visual
unfinished = comprehension.unfinished


@dataclass(frozen=True, kw_only=True)
class CaptionSet(DatasetOrigin):
    """Photographs with the captions of several people; called with its rows, it makes the documents of a task."""

    def __call__(self, rows: datasets.Dataset) -> "CaptionDocs":
        """Documents over the rows; see `CaptionDocs` for errors."""
        return CaptionDocs(self, rows)

    @property
    def wanted(self) -> str:
        """What a local copy holds, for messages to the user."""
        return f"{super().wanted} with the columns {', '.join(_EXPECTED)}"


class CaptionDocs(Documents):
    """One document per photograph: `image_id`, the column `question_id` without its ending, and `captions`.

    Raises:
        DatasetError: on construction, if there is no Java, a column is missing or of another type, a photograph is
            there twice or has no captions; on access, if an image cannot be decoded.
    """

    def __init__(self, source: CaptionSet, rows: datasets.Dataset) -> None:
        if shutil.which("java") is None:
            raise DatasetError(
                f"{source.title}: CIDEr and METEOR need Java (PTB tokenizer, METEOR 1.5); no `java` is on the PATH"
            )
        check_columns(source, rows.features, _EXPECTED)
        self._names = [str(name).rpartition(".")[0] or str(name) for name in rows["question_id"]]
        expect_once(source.place(), "question_id", self._names)
        self._captions = list(rows["answer"])
        empty = next((i for i, captions in enumerate(self._captions) if not captions), None)
        if empty is not None:
            raise DatasetError(
                f"{source.row(rows, empty, self._names[empty])}: column 'answer' holds no caption; is this a split "
                "without answers?"
            )
        self._encoded = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False))
        self._source = source
        said = [tuple(captions) for captions in self._captions]
        expect_different(source.place(), "photograph and captions", said, self._encoded, self._where)
        self._identity = object()
        self.features = datasets.Features(
            {"image_id": datasets.Value("string"), "captions": rows.features["answer"], IMAGE: rows.features[IMAGE]}
        )

    def __len__(self) -> int:
        return len(self._names)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image."""
        return {"image_id": self._names[i], "captions": self._captions[i]}

    def image(self, i: int) -> Image.Image:
        """Return a document's photograph, decoded."""
        return _DECODED.get((self._identity, i), lambda: opened(self._encoded[i][IMAGE], self._where(i)))

    def image_key(self, i: int) -> str:
        """Return the photograph's name."""
        return self._names[i]

    def _where(self, i: int) -> str:
        return self._source.row(self._encoded, i, self._names[i])


def doc_to_text(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> str:
    """The request, in the words of lmms-eval's own task."""
    return REQUEST


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """The first caption."""
    return str(doc["captions"][0])


def doc_to_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One user turn: the photograph, under the task's shift if it has one, and the request."""
    image = doc_to_visual(doc, lmms_eval_specific_kwargs)[0]
    content = [{"type": "image", "url": image}, {"type": "text", "text": REQUEST}]
    return [{"role": "user", "content": content, "log_probabilities": True}]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Keep one caption for the scores, which are of all captions together.

    Returns:
        The same record for every metric: `image`, `caption`, `captions` (of people), and for models of this package
        `confidence` by estimator. Reasoning is no part of a caption; one that ends inside it is empty, and shows in
        `unfinished_rate`.
    """
    response = Response.decode(results[0])
    record = {"image": doc["image_id"], "caption": response.answer.strip(), "captions": list(doc["captions"])}
    record |= comprehension.reasoned(response)
    rows: dict[str, Any] = dict.fromkeys((*METRICS, "CIDEr_low", "CIDEr_high"), record)
    rows["unfinished_rate"] = {"score": float(not response.parts.finished), "image": doc["image_id"]}
    if response.spoken.tokens:
        tokens = response.spoken.tokens
        evidence = Evidence([token.logprob for token in tokens], [True] * len(tokens))
        estimates = estimate_all(evidence, TEXT_ESTIMATORS)
        rows["CIDEr"] = {**record, "confidence": {name: value for name, value in estimates.items() if value == value}}
    return rows


class CaptionScores(NamedTuple):
    """A metric of all captions, and of each photograph's in the order of their names."""

    value: float
    each: npt.NDArray[np.float64]


def score(rows: Sequence[Mapping[str, Any]], metric: str) -> CaptionScores:
    """Score captions against those of people.

    Args:
        rows: records of `process_results`, one per photograph.
        metric: one of `METRICS`.
    """
    ordered = sorted(rows, key=lambda row: str(row["image"]))
    return _scored(tuple((row["image"], row["caption"], tuple(row["captions"])) for row in ordered))[metric]


@lru_cache(maxsize=2)
def _scored(rows: tuple[tuple[str, str, tuple[str, ...]], ...]) -> dict[str, CaptionScores]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    given = {image: [{"caption": caption} for caption in captions] for image, _, captions in rows}
    written = {image: [{"caption": caption}] for image, caption, _ in rows}
    tokenizer = PTBTokenizer()
    given, written = tokenizer.tokenize(given), tokenizer.tokenize(written)
    scores = {}
    for name, scorer in (("CIDEr", Cider()), ("METEOR", Meteor()), ("ROUGE_L", Rouge())):
        value, each = scorer.compute_score(given, written)
        scores[name] = CaptionScores(float(value), np.array(each, dtype=np.float64))
    values, of_each = Bleu(4).compute_score(given, written, verbose=0)
    scores["Bleu_4"] = CaptionScores(float(values[3]), np.array(of_each[3], dtype=np.float64))
    return scores


def cider(rows: Sequence[Mapping[str, Any]]) -> float:
    """CIDEr-D (Vedantam et al., CVPR 2015), 0 to 10; idf of the captions of the photographs that were asked."""
    return score(rows, "CIDEr").value


def cider_low(rows: Sequence[Mapping[str, Any]]) -> float:
    """Lower end of its 95 % interval; photographs are drawn with replacement, idf stays."""
    return bounds(score(rows, "CIDEr").each)[0]


def cider_high(rows: Sequence[Mapping[str, Any]]) -> float:
    """Upper end of its 95 % interval."""
    return bounds(score(rows, "CIDEr").each)[1]


def meteor(rows: Sequence[Mapping[str, Any]]) -> float:
    """METEOR 1.5 (Denkowski and Lavie, 2014), 0 to 1."""
    return score(rows, "METEOR").value


def bleu_4(rows: Sequence[Mapping[str, Any]]) -> float:
    """BLEU of up to four words (Papineni et al., 2002), of all captions together, 0 to 1."""
    return score(rows, "Bleu_4").value


def rouge_l(rows: Sequence[Mapping[str, Any]]) -> float:
    """ROUGE-L (Lin, 2004), 0 to 1."""
    return score(rows, "ROUGE_L").value


val2014 = CaptionSet(
    name="coco_caption2014", title="COCO captions 2014", hub_id="lmms-lab-encoder/COCO-Caption", split="val"
)
val2017 = CaptionSet(
    name="coco_caption2017", title="COCO captions 2017", hub_id="lmms-lab-encoder/COCO-Caption2017", split="val"
)
SETS: Mapping[str, CaptionSet] = {"val2014": val2014, "val2017": val2017}
"""What tasks are made of, by name."""
