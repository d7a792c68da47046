"""Rejection is scored by confidence and by giving no box, never by where the box is."""

import math
import random

import pytest

from lmms_plugin.protocol.response import Response, Token
from lmms_plugin.tasks.grounding import rejection, reworded
from lmms_plugin.tasks.grounding.rejection import RejectionOutcome, auroc, confidence_falls, fpr_at_0_95

DOC = {
    "bbox": [100.0, 0.0, 100.0, 100.0],
    "width": 200,
    "height": 100,
    "expression": "red cup",
    "expression_id": "7/0",
    "image_id": "photo",
    "pair": "7/0",
    "matches": True,
    "original_expression": "red cup",
    "shifted_rate": 0.75,
}
CHANGED = {
    **DOC,
    "expression": "green cup",
    "expression_id": "7/0/changed",
    "matches": False,
    "change": {"kind": "colour"},
}


def answer(text, logprob=-0.1):
    tokens = tuple(Token(character, logprob) for character in text)
    return Response(text, tokens, (200, 100), None, "qwen3_vl").encode()


def judged(doc, text):
    return rejection.process_results(doc, [text], estimator="coordinate_mean")


def test_the_record_says_what_was_asked_and_what_it_was():
    record = judged(CHANGED, answer("[500, 0, 1000, 1000]"))["box_rate"]
    assert record["expression"] == "green cup"
    assert record["original_expression"] == "red cup"
    assert record["change"] == {"kind": "colour"}
    assert record["pair"] == "7/0"
    assert record["matches"] == 0.0
    assert "target" not in record


@pytest.mark.parametrize("text", ["[500, 0, 1000, 1000]", "[0, 0, 10, 10]"], ids=["right", "wrong"])
def test_where_the_box_is_does_not_matter(text):
    output = judged(DOC, answer(text))
    assert output["rejection_auroc"] == RejectionOutcome("7/0", 1.0, pytest.approx(math.exp(-0.1)))
    assert not {"acc@0.5", "mean_iou", "ece"} & set(output)


def test_an_answer_without_a_box_has_no_confidence_at_all():
    output = judged(CHANGED, answer("there is no green cup"))
    assert output["rejection_auroc"].confidence == 0.0
    assert output["box_rate_changed"]["score"] == 0.0
    assert "box_rate_true" not in output
    assert set(output["box_rate"]["confidence"].values()) == {0.0}


def test_models_that_tell_no_probabilities_have_their_boxes_counted_alone():
    output = judged(DOC, "[0.5, 0.0, 1.0, 1.0]")
    assert set(output) == {"box_rate", "box_rate_true", "shifted_rate", "unfinished_rate"}
    assert output["box_rate"]["score"] == 1.0


def records(true, changed):
    return [RejectionOutcome(str(i), 1.0, c) for i, c in enumerate(true)] + [
        RejectionOutcome(str(i), 0.0, c) for i, c in enumerate(changed)
    ]


@pytest.mark.parametrize(
    ("true", "changed", "area", "accepted", "falls"),
    [
        ([0.9, 0.8], [0.2, 0.1], 1.0, 0.0, 1.0),
        ([0.2, 0.1], [0.9, 0.8], 0.0, 1.0, 0.0),
        ([0.5, 0.5], [0.5, 0.5], 0.5, 1.0, 0.5),
        ([0.9, 0.3], [0.5, 0.1], 0.75, 0.5, 1.0),
    ],
    ids=["told apart", "upside down", "ties", "pairs apart, ranking not"],
)
def test_closed_forms(true, changed, area, accepted, falls):
    found = records(true, changed)
    random.Random(0).shuffle(found)
    assert auroc(found) == area
    assert fpr_at_0_95(found) == accepted
    assert confidence_falls(found) == falls


def test_half_a_pair_does_not_count_as_one():
    assert confidence_falls([*records([0.9], [0.1]), RejectionOutcome("lonely", 1.0, 0.0)]) == 1.0
    assert math.isnan(confidence_falls([RejectionOutcome("lonely", 1.0, 0.5)]))


def test_one_sort_alone_is_undefined():
    assert math.isnan(auroc(records([0.5, 0.6], [])))
    assert math.isnan(fpr_at_0_95([]))


def test_a_reworded_answer_is_scored_as_usual_and_keeps_the_original():
    doc = {**DOC, "expression": "erd cup"}
    output = reworded.scored_by_coordinate_mean(doc, [answer("[500, 0, 1000, 1000]")])
    assert output["acc@0.5"]["score"] == 1.0
    assert output["mean_iou"]["expression"] == "erd cup"
    assert output["mean_iou"]["original_expression"] == "red cup"
    assert output["shifted_rate"]["score"] == 0.75
