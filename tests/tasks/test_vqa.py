"""VQA as lmms-eval functions: records, what an answer counts for, and metrics of known streams."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import vqa_copies

from lmms_plugin import metrics, registration
from lmms_plugin.confidence.departure import MEASURES
from lmms_plugin.confidence.estimators import LEARNED, NEEDS, TEXT_ESTIMATORS
from lmms_plugin.protocol.response import ForcedAnswer, Response, Token
from lmms_plugin.tasks.grounding.aggregations import FlipOutcome
from lmms_plugin.tasks.registry import task_files
from lmms_plugin.tasks.vqa import aggregations, answering, questions
from lmms_plugin.tasks.vqa.aggregations import BESIDE, NEEDS_HELD_OUT, ON_TEST, VqaOutcome
from lmms_plugin.tasks.vqa.questions import PARTS, Parts

DOC = {
    "dataset": "vqav2",
    "question_id": "vqav2/7",
    "image_id": "coco/7",
    "part": "test",
    "question": "Is it red?",
    "answers": ["yes"] * 3 + ["no"] * 7,
}


def answer(*tokens):
    return Response("".join(text for text, _ in tokens), tuple(Token(*token) for token in tokens)).encode()


YES = answer((" Yes", -0.1), (".", -0.2), ("", -0.3))


def score(text=YES, **changes):
    return answering.scored_by_joint({**DOC, **changes}, [text])


def test_an_answer_is_scored_with_every_confidence():
    record = score()["accuracy"]
    assert record["accuracy"] == record["score"] == 0.9
    assert record["answer"] == " Yes."
    assert set(record["confidence"]) == set(TEXT_ESTIMATORS) - set(NEEDS)
    assert record["confidence"]["joint"] == pytest.approx(math.exp(-0.6))
    assert record["confidence"]["first"] == pytest.approx(math.exp(-0.1))
    assert record["confidence"]["word_joint"] == pytest.approx(math.exp(-0.3))


@pytest.mark.parametrize("name", list(TEXT_ESTIMATORS))
def test_the_named_estimator_is_used(name):
    response = replace(Response.decode(YES), samples=("yes", "no"), statement="75%")
    output = getattr(answering, f"scored_by_{name}")(DOC, [response.encode()])
    assert output["ece"].confidence == output["accuracy"]["confidence"][name]


def test_samples_agree_where_they_are_the_same_answer_by_the_rules_of_the_score():
    response = replace(Response.decode(YES), samples=("yes", "The yes!", "no", ""), statement="no idea")
    output = answering.scored_by_joint(DOC, [response.encode()])
    confidence = output["accuracy"]["confidence"]
    assert confidence["agreement"] == output["aurc_agreement"].confidence == 0.5
    assert confidence["agreement_pairwise"] == pytest.approx(1 / 6)
    assert "verbalised" not in confidence
    assert output["verbalised_rate"]["score"] == 0.0


@pytest.mark.parametrize(("part", "counts"), [("test", True), ("val", False)])
def test_the_distance_from_a_reference_is_recorded_with_its_own_accuracy(part, counts):
    no = (Token("No", -0.1), Token("", -0.2))
    less = (Token("No", -1.1), Token("", -0.2))
    response = replace(
        Response.decode(answer(("maybe", -0.1))), forced=ForcedAnswer(no, less, (0.4, 0.0), (True, True))
    )
    output = score(response.encode(), part=part)
    record = output["accuracy"]["reference"]
    assert record.keys() == {"score", *MEASURES} - {"kl_coordinates", "box_shift"}
    assert (record["score"], record["kl"], record["answer_agreement"]) == (1.0, 0.2, 1.0)
    assert record["answer_probability_change"] == pytest.approx(math.exp(-1.3) - math.exp(-0.3))
    assert ("kl" in output) is counts
    assert output.get("flips_predicted") == (FlipOutcome("vqav2/7", 0.2, 1.0) if counts else None)


@pytest.mark.parametrize("name", ["agreement", "verbalised"])
def test_what_a_model_was_not_asked_for_is_said_how_to_obtain(name):
    with pytest.raises(ValueError, match=r"needs \(run with --model_args"):
        getattr(answering, f"scored_by_{name}")(DOC, [YES])


@pytest.mark.parametrize(
    ("part", "counted"),
    [("test", {*ON_TEST, *NEEDS_HELD_OUT}), ("val", set(NEEDS_HELD_OUT)), ("dev", set())],
)
def test_what_a_question_of_each_part_counts_for(part, counted):
    output = score(part=part)
    assert {*ON_TEST, *NEEDS_HELD_OUT} & set(output) == counted
    assert ("confidence_rate" in output) == ("score" in output["accuracy"]) == (part != "val")
    assert output["accuracy"]["accuracy"] == 0.9


def test_models_that_are_not_ours_are_scored_and_counted_as_without_confidence():
    output = score("yes")
    assert output["accuracy"]["score"] == 0.9
    assert output["confidence_rate"]["score"] == 0.0
    assert output["accuracy"]["confidence"] == {}
    assert not {*ON_TEST, *NEEDS_HELD_OUT} & set(output)


def test_an_answer_that_says_nothing_has_the_probability_of_ending_at_once():
    record = score(answer(("", -0.5)))["accuracy"]
    assert record["confidence"]["joint"] == pytest.approx(math.exp(-0.5))
    assert "word_joint" not in record["confidence"]
    assert record["accuracy"] == 0.0


def test_both_readings_of_unanimous_answers_are_reported():
    output = score(answers=["yes"] * 10)
    assert output["accuracy"]["score"] == 1.0
    assert output["accuracy_reliable_vqa"]["score"] == 0.0


@pytest.fixture(scope="module")
def docs():
    return Parts("vqav2", tuple(PARTS))(vqa_copies.rows("vqav2", images=4))


def test_messages_ask_for_log_probabilities_and_other_models_do_not_see_it(docs):
    from lmms_eval.protocol import ChatMessages

    messages = answering.doc_to_messages(docs[0])
    assert messages[0]["log_probabilities"] is True
    assert ChatMessages(messages=messages).to_hf_messages()[0]["content"][1]["text"] == (
        "Is there an animal in the picture?\nAnswer the question using a single word or phrase."
    )
    assert answering.doc_to_text(docs[0], {"post_prompt": " Briefly."}).endswith("picture? Briefly.")
    assert "Unanswerable" in answering.doc_to_text({**docs[0], "dataset": "vizwiz"})


def test_photographs_can_be_shifted_as_those_of_grounding(docs):
    place = {"shift": "gaussian_noise", "severity": 3}
    clean, shifted = answering.doc_to_visual(docs[0])[0], answering.doc_to_visual(docs[1], place)[0]
    assert clean.size == shifted.size
    assert clean.tobytes() != shifted.tobytes()


def test_target_is_what_most_people_said(docs):
    assert [answering.doc_to_target(docs[i]) for i in range(3)] == ["no", "woman", "1"]


# Metrics


def stream(n=600, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(size=n).round(2)
    accuracy = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], size=n) * (rng.uniform(size=n) < confidence)
    accuracy = np.where(confidence > 0.8, 1.0, accuracy)
    part = rng.choice(["val", "test"], size=n, p=[0.2, 0.8])
    return [VqaOutcome(str(p), float(c), float(a)) for p, c, a in zip(part, confidence, accuracy, strict=True)]


def columns(records, part):
    chosen = [record for record in records if record.part == part]
    return [r.confidence for r in chosen], [r.accuracy for r in chosen]


@pytest.mark.parametrize("name", [*ON_TEST, *NEEDS_HELD_OUT])
def test_metrics_do_not_depend_on_the_order_of_records(name):
    aggregate = {**ON_TEST, **NEEDS_HELD_OUT}[name]
    records = stream()
    value = aggregate(records)
    assert math.isfinite(value)
    assert aggregate(random.Random(0).sample(records, len(records))) == value


def test_metrics_are_those_of_the_test_part():
    records = stream()
    test = columns(records, "test")
    assert ON_TEST["ece"](records) == pytest.approx(metrics.ece(*test))
    assert ON_TEST["coverage@0.1"](records) == metrics.coverage_at_risk(*test, 0.1)
    assert ON_TEST["aurc"]([r for r in records if r.part == "test"]) == ON_TEST["aurc"](records)


def test_thresholds_come_from_the_held_out_part():
    records = stream()
    threshold = metrics.threshold_at_cost(*columns(records, "val"), 10)
    phi = metrics.effective_reliability(*columns(records, "test"), 10, threshold)
    assert NEEDS_HELD_OUT["phi@10"](records) == pytest.approx(phi)
    certain = [VqaOutcome("val", 0.9, 1.0), VqaOutcome("val", 0.5, 0.0)]
    tested = [
        VqaOutcome("test", 0.95, 1.0),
        VqaOutcome("test", 0.9, 0.0),
        VqaOutcome("test", 0.6, 1.0),
        VqaOutcome("test", 0.1, 0.0),
    ]
    assert NEEDS_HELD_OUT["phi@10"](certain + tested) == pytest.approx((1 - 10) / 4)
    assert NEEDS_HELD_OUT["phi_coverage@10"](certain + tested) == 0.5
    assert NEEDS_HELD_OUT["achieved_risk@0.05"](certain + tested) == 0.5


def test_nothing_is_made_up_where_a_part_is_missing():
    tested = [record for record in stream() if record.part == "test"]
    assert math.isnan(NEEDS_HELD_OUT["phi@1"](tested))
    assert math.isnan(ON_TEST["ece"]([VqaOutcome("val", 0.5, 1.0)]))
    assert math.isnan(aggregations.accuracy([{"part": "val", "accuracy": 1.0}]))


def test_the_yaml_lists_every_metric_under_its_own_function():
    path = Path(registration.tasks_folder()) / "vqa" / "reliable_vqa" / "_reliable_vqa.yaml"
    listed = {m["metric"]: m for m in task_files.read(path)["metric_list"]}
    beside = {f"{name}_{by}" for name in BESIDE for by in {*LEARNED, *NEEDS} - {"expected_iou"}}
    counted = {"accuracy", "accuracy_reliable_vqa", "confidence_rate", "unfinished_rate", "verbalised_rate"}
    apart = {*MEASURES, "flips_predicted"} - {"kl_coordinates", "box_shift"}
    assert set(listed) == {*counted, *ON_TEST, *NEEDS_HELD_OUT, *beside, *apart}
    for by in {*LEARNED, *NEEDS} - {"expected_iou"}:
        for name in BESIDE:
            assert listed[f"{name}_{by}"]["aggregation"] == listed[name]["aggregation"]
    for name, aggregate in {**ON_TEST, **NEEDS_HELD_OUT}.items():
        assert getattr(aggregations, listed[name]["aggregation"].rpartition(".")[2]) is aggregate


def test_every_task_names_documents_that_exist():
    folder = Path(registration.tasks_folder()) / "vqa" / "reliable_vqa"
    named = {task_files.read(path).get("process_docs", "").rpartition(".")[2] for path in folder.glob("*.yaml")} - {""}
    assert {*questions.MIXTURES, "vqav2", "advqa", "vizwiz", "vqav2_dev"} == named
