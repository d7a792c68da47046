"""Retrieval documents, their pools, and R@k against counts made by hand."""

import datasets
import numpy as np
import pytest
from helpers import caption_copies

from lmms_plugin.metrics.bootstrap import RESAMPLES
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.retrieval.matching import CaptionedSet, process_results, ranking_scores
from lmms_plugin.utils.copies import DatasetError

SOURCE = CaptionedSet(name="flickr30k", title="Flickr30k", hub_id="owner/flickr30k", split="test", pool=4)


@pytest.fixture(scope="module")
def docs():
    return SOURCE(caption_copies.flickr30k(9))


def test_pools_part_the_photographs_and_hold_their_captions(docs):
    contents = [docs.content(i) for i in range(len(docs))]
    assert sorted(doc["filename"] for doc in contents) == [f"{1000 + number}.jpg" for number in range(9)]
    assert [doc["pool"] for doc in contents] == sorted(doc["pool"] for doc in contents)
    for pool in {doc["pool"] for doc in contents}:
        members = [doc for doc in contents if doc["pool"] == pool]
        assert {doc["pool_size"] for doc in members} == {len(members)}
        assert [doc["place"] for doc in members] == list(range(len(members)))
        for doc in members:
            assert doc["candidates"] == [caption for member in members for caption in member["caption"]]
            own = doc["candidates"][5 * doc["place"] : 5 * doc["place"] + 5]
            assert own == doc["caption"]


def test_pools_depend_on_names_and_not_on_the_order_of_rows(docs):
    turned = SOURCE(caption_copies.flickr30k(9).select(range(8, -1, -1)))
    assert [docs.content(i) for i in range(9)] == [turned.content(i) for i in range(9)]
    assert [docs.image(i).tobytes() for i in (0, 5)] == [turned.image(i).tobytes() for i in (0, 5)]


def test_without_pools_everything_is_a_candidate():
    everything = CaptionedSet(name="flickr30k", title="Flickr30k", hub_id=None, split="test")
    assert len(everything(caption_copies.flickr30k(9)).content(3)["candidates"]) == 45


def test_photographs_of_other_splits_are_left_out():
    both = datasets.concatenate_datasets(
        [caption_copies.flickr30k(3), caption_copies.flickr30k(4, split="train", filename="other.jpg")]
    )
    assert len(SOURCE(both)) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: caption_copies.flickr30k(3).remove_columns("caption"), "column 'caption' is missing: expected a list"),
        (lambda: caption_copies.flickr30k(3).rename_column("filename", "file"), "column 'filename' is missing"),
        (lambda: caption_copies.flickr30k(3, caption=["a", "b"]), "expected 5 captions, got"),
        (
            lambda: caption_copies.flickr30k(3, filename="same.jpg"),
            "column 'filename': expected every row once, got 'same.jpg' in rows 0 and 1",
        ),
        (lambda: caption_copies.flickr30k(3, split="train"), "expected rows of 'test', got"),
        (lambda: wide(caption_copies.flickr30k(1)), "more than the 1000 of Karpathy's test split"),
    ],
    ids=["no captions", "no names", "two captions", "one name", "another split", "all of Flickr30k"],
)
def test_what_does_not_fit_is_named(rows, message):
    with pytest.raises(DatasetError, match=message):
        SOURCE(rows())


def wide(rows):
    return rows.remove_columns("split").select([0] * 1001)


# Two photographs; mean log-probabilities of their ten captions.
MATRIX = np.array(
    [
        [-1.0, -3.0, -3.0, -3.0, -3.0, -2.0, -2.0, -2.0, -2.0, -2.0],
        [-2.0, -2.0, -2.0, -2.0, -4.0, -3.0, -3.0, -1.5, -3.0, -3.0],
    ]
)


def scored(matrix, tokens=4, size=2):
    outputs = []
    for place, row in enumerate(matrix):
        answer = Response("", scores={"logprob": tuple(tokens * row), "tokens": (tokens,) * len(row)}).encode()
        doc = {"filename": f"{place}.jpg", "pool": 0, "pool_size": size, "place": place}
        outputs.append(process_results(doc, [answer]))
    return outputs


def test_recall_is_what_one_counts_by_hand():
    outputs = scored(MATRIX)
    # The first photograph's own best is the best; of the second, too.
    assert [output["text_r@1"]["score"] for output in outputs] == [1.0, 1.0]
    # Of the ten captions the first photograph wins its 1st and 5th, the second of its own only the 3rd.
    rows = [output["image_r@1"] for output in outputs]
    assert matching.image_r_at_1(rows) == pytest.approx((2 + 1) / 10)
    assert matching.image_r_at_5(rows) == 1.0
    low, high = matching.image_low(rows), matching.image_high(rows)
    assert low == pytest.approx(0.2)
    assert high == pytest.approx(0.4)


def test_of_equal_scores_the_others_come_first():
    outputs = scored(np.zeros((2, 10)))
    assert [output["text_r@1"]["score"] for output in outputs] == [0.0, 0.0]
    assert [output["text_r@5"]["score"] for output in outputs] == [0.0, 0.0]
    assert [output["text_r@10"]["score"] for output in outputs] == [1.0, 1.0]
    assert matching.image_r_at_1([output["image_r@1"] for output in outputs]) == 0.0


def test_length_is_divided_out():
    scores = ranking_scores({"logprob": (-4.0, -6.0), "tokens": (2, 6)})
    assert list(scores) == [-2.0, -1.0]
    answer = Response("", scores={"logprob": (-4.0,) * 5 + (-3.0,) * 5, "tokens": (4,) * 5 + (1,) * 5}).encode()
    output = process_results({"filename": "a.jpg", "pool": 0, "pool_size": 2, "place": 0}, [answer])
    assert output["text_r@1"]["score"] == 1.0
    assert output["text_r@1_sum"]["score"] == 0.0


def test_pairs_that_the_matching_head_did_not_see_come_last():
    scores = ranking_scores({"itc": (0.9, 0.1, 0.8), "itm": (None, -3.0, None)})
    assert list(np.argsort(-scores)) == [1, 0, 2]


def test_pools_asked_in_part_do_not_count_for_image_retrieval():
    rows = [output["image_r@1"] for output in scored(MATRIX, size=3)]
    assert np.isnan(matching.image_r_at_1(rows))


def test_a_model_that_does_not_score_is_refused():
    with pytest.raises(ValueError, match="needs a model that scores candidates"):
        process_results({"filename": "a.jpg", "pool": 0, "pool_size": 2, "place": 0}, ["a dog"])


def test_bounds_are_quantiles_of_means_over_photographs_drawn_anew():
    hits = np.random.default_rng(3).integers(0, matching.CAPTIONS + 1, 40) / matching.CAPTIONS
    means = [
        hits[np.random.default_rng([0, resample]).integers(0, hits.size, hits.size)].mean()
        for resample in range(RESAMPLES)
    ]
    assert matching.bounds(hits) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-15)
    assert np.isnan(matching.bounds(hits[:1])).all()
