"""Text and image retrieval: documents, scores and R@k.

A document is one photograph with candidates, the captions of its pool. The model does not generate text: it scores how
well each candidate fits. Both directions use the same scores: captions are ranked for each photograph (text retrieval),
and the photographs of a pool for each caption (image retrieval). Pools are parts of the dataset, drawn by a hash of the
photograph's name and `SEED`. One pool of all photographs is the published protocol; small pools are a cheaper and
easier one, whose numbers are not comparable with published ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from lmms_plugin.metrics.bootstrap import bootstrap, interval
from lmms_plugin.metrics.sums import ClusterMean
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.sources.documents import IMAGE, Documents
from lmms_plugin.tasks.sources.origins import DatasetOrigin
from lmms_plugin.tasks.sources.recent import Recent
from lmms_plugin.tasks.sources.repeats import expect_different, expect_once
from lmms_plugin.tasks.sources.row_images import opened
from lmms_plugin.utils.chance import uniform
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.images import to_rgb

SEED = 1234
CAPTIONS = 5
KARPATHY_TEST = 1000
REQUEST = "Provide a one-sentence caption for the provided image."
_EXPECTED = {IMAGE: "an image", "caption": "a list of strings", "filename": "a string"}

_DECODED: Recent[Image.Image] = Recent(8)


@dataclass(frozen=True, kw_only=True)
class CaptionedSet(DatasetOrigin):
    """Photographs with five captions each; called with its rows, it returns the documents of a task.

    Attributes:
        pool: Number of photographs that are candidates for one another; None for all.
    """

    pool: int | None = None

    def __call__(self, rows: datasets.Dataset) -> "RetrievalDocs":
        """Return documents over the rows; see `RetrievalDocs` for errors."""
        return RetrievalDocs(self, rows)

    @property
    def wanted(self) -> str:
        """Content of a local copy, for messages to the user."""
        return f"{super().wanted} with the columns {', '.join(_EXPECTED)}, and split unless it is the test split alone"


class RetrievalDocs(Documents):
    """One document per photograph, pool by pool.

    Attributes:
        pools: Pool of each document, shape (photographs,).

    Raises:
        DatasetError: On construction, a column is missing or of another type, a photograph does not have five captions
            or has an empty one, or the photographs of the test split cannot be identified; on access, an image cannot
            be decoded.
    """

    def __init__(self, source: CaptionedSet, rows: datasets.Dataset) -> None:
        check_columns(source, rows.features, _EXPECTED)
        light = rows.select_columns([name for name in rows.column_names if name != IMAGE])
        chosen = _of_test_split(source, light)
        table: list[dict[str, Any]] = light.select(chosen).to_list()
        _check_captions(source, table)
        names = [row["filename"] for row in table]
        expect_once(source.place(), "filename", names)
        by_chance = sorted(range(len(names)), key=lambda i: uniform(f"{SEED}/pool/{names[i]}"))
        parts = np.array_split(by_chance, max(1, len(names) // source.pool) if source.pool else 1)
        order = [int(i) for part in parts for i in part]
        self.pools = [number for number, part in enumerate(parts) for _ in part]
        self._starts = [sum(len(part) for part in parts[:number]) for number in range(len(parts))]
        self._sizes = [len(part) for part in parts]
        self._names = [names[i] for i in order]
        self._rows = [chosen[i] for i in order]
        self._captions = [table[i]["caption"] for i in order]
        self._encoded = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False)).select(self._rows)
        self._source = source
        said = [tuple(captions) for captions in self._captions]
        expect_different(source.place(), "photograph and captions", said, self._encoded, self._where)
        self._identity = object()
        self.features = datasets.Features(
            {"filename": datasets.Value("string"), "caption": rows.features["caption"], IMAGE: rows.features[IMAGE]}
        )

    def __len__(self) -> int:
        return len(self._names)

    def content(self, i: int) -> dict[str, Any]:
        """Return a document without its image: name, pool, index in the pool, its captions, and all candidates."""
        start = self._starts[self.pools[i]]
        size = self._sizes[self.pools[i]]
        return {
            "filename": self._names[i],
            "caption": self._captions[i],
            "pool": self.pools[i],
            "pool_size": size,
            "place": i - start,
            "candidates": [text for captions in self._captions[start : start + size] for text in captions],
        }

    def image(self, i: int) -> Image.Image:
        """Return a document's photograph, decoded."""
        return _DECODED.get((self._identity, i), lambda: opened(self._encoded[i][IMAGE], self._where(i)))

    def image_key(self, i: int) -> str:
        """Return the photograph's name."""
        return str(self._names[i])

    def _where(self, i: int) -> str:
        return self._source.row(self._encoded, self._rows[i], self._names[i])


def _of_test_split(source: CaptionedSet, light: datasets.Dataset) -> list[int]:
    if "split" in light.column_names:
        splits = light["split"]
        chosen = [i for i, split in enumerate(splits) if split == source.split]
        if not chosen:
            raise DatasetError(
                f"{source.place()}: column 'split': expected rows of {source.split!r}, got {sorted(set(splits))}"
            )
        return chosen
    if len(light) > KARPATHY_TEST:
        raise DatasetError(
            f"{source.place()}: column 'split' is missing: {len(light)} photographs are more than the {KARPATHY_TEST} "
            f"of Karpathy's test split, and nothing tells which those are; the columns are {sorted(light.column_names)}"
        )
    return list(range(len(light)))


def check_columns(source: DatasetOrigin, features: datasets.Features, expected: Mapping[str, str]) -> None:
    """Refuse a dataset in which a column is missing or has values of another type.

    Args:
        source: Name of the dataset, for the message.
        features: Features of the dataset.
        expected: Column → "an image", "a string" or "a list of strings".

    Raises:
        DatasetError: A column does not match; names it, what was expected and what is there.
    """
    for name, kind in expected.items():
        if name not in features:
            raise DatasetError(
                f"{source.place()}: column {name!r} is missing: expected {kind}; the columns are {sorted(features)}"
            )
        feature = features[name]
        text = getattr(feature, "feature", None) if kind == "a list of strings" else feature
        fits = (
            isinstance(feature, datasets.Image) if kind == "an image" else "string" in str(getattr(text, "dtype", ""))
        )
        if not fits:
            raise DatasetError(f"{source.place()}: column {name!r}: expected {kind}, got {feature}")


def _check_captions(source: CaptionedSet, table: Sequence[Mapping[str, Any]]) -> None:
    for row in table:
        captions = row["caption"]
        if len(captions) != CAPTIONS or not all(caption and caption.strip() for caption in captions):
            raise DatasetError(
                f"{source.place()}: {row['filename']}: column 'caption': expected {CAPTIONS} captions, got {captions}"
            )


def doc_to_visual(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> list[Image.Image]:
    """Return the photograph."""
    return [to_rgb(doc[IMAGE])]


def doc_to_text(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> str:
    """Return the request that a caption answers."""
    return REQUEST


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """Return the first of the photograph's captions."""
    return str(doc["caption"][0])


def doc_to_messages(doc: Mapping[str, Any], task: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return one user turn; the extra key `candidates` holds what the model scores as answers."""
    content = [{"type": "image", "url": doc_to_visual(doc)[0]}, {"type": "text", "text": REQUEST}]
    return [{"role": "user", "content": content, "candidates": doc["candidates"]}]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Rank the candidates of one photograph.

    Args:
        doc: Document of `RetrievalDocs`.
        results: Model's scores in the trailer of `lmms_plugin.protocol.response`.

    Returns:
        Text retrieval at 1, 5 and 10: whether one of the photograph's captions is among the first k of its pool; a
        candidate with an equal score ranks before it. Image retrieval: the scores, for aggregation over photographs.

    Raises:
        ValueError: The model does not score candidates; models of other packages cannot.
    """
    given = Response.decode(results[0]).scores
    if not given:
        raise ValueError(f"{doc['filename']}: retrieval needs a model that scores candidates (quant_*), got an answer")
    own = range(CAPTIONS * doc["place"], CAPTIONS * (doc["place"] + 1))
    identity = {"image": doc["filename"], "pool": doc["pool"]}
    scores = ranking_scores(given)
    row = {**identity, "pool_size": doc["pool_size"], "place": doc["place"], "scores": scores.tolist()}
    output: dict[str, Any] = {}
    for k in (1, 5, 10):
        output[f"text_r@{k}"] = {"score": float(_rank(scores, own) < k), **identity}
        output[f"image_r@{k}"] = row
    for name in ("text_r@1_low", "text_r@1_high"):
        output[name] = output["text_r@1"]
    for name in ("image_r@1_low", "image_r@1_high"):
        output[name] = row
    if "logprob" in given:
        unnormalised = _rank(np.array(given["logprob"], dtype=np.float64), own)
        output["text_r@1_sum"] = {"score": float(unnormalised < 1), **identity}
    output["candidates"] = {"score": float(len(scores)), **identity}
    return output


def ranking_scores(given: Mapping[str, Sequence[float | None]]) -> npt.NDArray[np.float64]:
    """Return the scores by which candidates are ranked, shape (candidates,), larger for a better fit.

    For a language model: the mean log-probability of a caption's tokens; the sum would favour short captions. For a
    retrieval checkpoint: the logit of its matching head plus the similarity of its projections. Pairs that the head did
    not see have the similarity alone and rank after all others.
    """
    if "logprob" in given:
        return np.array(given["logprob"], dtype=np.float64) / np.array(given["tokens"], dtype=np.float64)
    similarity = np.array(given["itc"], dtype=np.float64)
    matching = np.array([np.nan if value is None else value for value in given["itm"]], dtype=np.float64)
    # Similarities are cosines, so a bounded shift ranks all pairs that the head saw before the others.
    last = np.nanmin(matching) - 4.0 if not np.isnan(matching).all() else 0.0
    return similarity + np.where(np.isnan(matching), last, matching)


def _rank(scores: npt.NDArray[np.float64], own: range) -> int:
    """Return how many candidates rank before the best of the own ones; among equal scores, others come first."""
    best = scores[own.start : own.stop].max()
    others = np.delete(scores, np.arange(own.start, own.stop))
    return int(np.count_nonzero(others >= best))


def _image_hits(rows: Sequence[Mapping[str, Any]], k: int) -> npt.NDArray[np.float64]:
    """Return for each photograph the share of its captions for which it is among the first k, shape (images,).

    Photographs of incomplete pools (`--limit`) are left out: they had fewer rivals.
    """
    by_pool: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_pool.setdefault(row["pool"], {})[row["place"]] = row
    hits = []
    for _, members in sorted(by_pool.items()):
        if len(members) < next(iter(members.values()))["pool_size"]:
            continue
        matrix = np.array([members[place]["scores"] for place in sorted(members)], dtype=np.float64)
        for place in range(len(matrix)):
            captions = matrix[:, CAPTIONS * place : CAPTIONS * (place + 1)]
            rivals = np.delete(captions, place, axis=0)
            hits.append(float(((rivals >= captions[place]).sum(0) < k).mean()))
    return np.array(hits, dtype=np.float64)


def image_r_at(rows: Sequence[Mapping[str, Any]], k: int) -> float:
    """Return image retrieval at k, a fraction in [0, 1]; NaN without a complete pool."""
    hits = _image_hits(rows, k)
    return float(hits.mean()) if hits.size else float("nan")


def image_r_at_1(rows: Sequence[Mapping[str, Any]]) -> float:
    """Image retrieval at 1."""
    return image_r_at(rows, 1)


def image_r_at_5(rows: Sequence[Mapping[str, Any]]) -> float:
    """Image retrieval at 5."""
    return image_r_at(rows, 5)


def image_r_at_10(rows: Sequence[Mapping[str, Any]]) -> float:
    """Image retrieval at 10."""
    return image_r_at(rows, 10)


def bounds(scores: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of a mean over photographs, which are drawn with replacement with fixed candidates.

    Args:
        scores: Score of each photograph, shape (photographs,), of any range: recall ends at 1, CIDEr at 10.
    """
    if scores.size < 2:
        return float("nan"), float("nan")
    (drawn,) = bootstrap([ClusterMean(scores)], scores.size)
    return interval(*drawn.of("mean"))


def _text_hits(records: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    ordered = sorted(records, key=lambda record: str(record["image"]))
    return np.array([record["score"] for record in ordered], dtype=np.float64)


def text_low(records: Sequence[Mapping[str, Any]]) -> float:
    """Lower end of the interval of text retrieval at 1."""
    return bounds(_text_hits(records))[0]


def text_high(records: Sequence[Mapping[str, Any]]) -> float:
    """Upper end of the interval of text retrieval at 1."""
    return bounds(_text_hits(records))[1]


def image_low(rows: Sequence[Mapping[str, Any]]) -> float:
    """Lower end of the interval of image retrieval at 1."""
    return bounds(_image_hits(rows, 1))[0]


def image_high(rows: Sequence[Mapping[str, Any]]) -> float:
    """Upper end of the interval of image retrieval at 1."""
    return bounds(_image_hits(rows, 1))[1]


# Columns and number of rows are those of the repository's card; the copy with all of Flickr30k under lmms-eval's name
# (31,783 rows, all of them called "test") does not identify Karpathy's split.
flickr30k = CaptionedSet(name="flickr30k", title="Flickr30k", hub_id="umaru97/flickr30k_train_val_test", split="test")
flickr30k_pool20 = replace(flickr30k, pool=20)
SETS: Mapping[str, CaptionedSet] = {"flickr30k": flickr30k, "flickr30k_pool20": flickr30k_pool20}
"""Name → dataset, for tasks."""
