import math
import random
from pathlib import Path

import datasets
import pytest
from helpers import photographs

from lmms_plugin import metrics, registration
from lmms_plugin.confidence.departure import MEASURES
from lmms_plugin.confidence.estimators import ESTIMATORS, LEARNED, NEEDS
from lmms_plugin.protocol.response import Alternatives, ForcedAnswer, Response, Token
from lmms_plugin.tasks.grounding import aggregations, comprehension, scored_by
from lmms_plugin.tasks.grounding.aggregations import FlipOutcome, GroundingOutcome
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.registry import task_files

# A 200 x 100 image whose object covers its right half.
DOC = {
    "bbox": [100.0, 0.0, 100.0, 100.0],
    "width": 200,
    "height": 100,
    "expression": "right half",
    "expression_id": "7/0",
    "image_id": "photo",
}


def answer(text, dialect="qwen3_vl", logprob=-0.1, model_size=None):
    tokens = tuple(Token(character, logprob) for character in text)
    return Response(text, tokens, (200, 100), model_size, dialect).encode()


def everything(text, samples=("[500, 0, 1000, 1000]", "[500, 0, 750, 1000]", "no idea"), statement="80"):
    """An answer certain of its digits, with sampled answers and a stated confidence."""
    tokens = tuple(Token(c, -0.1, Alternatives({c: 1.0}) if c.isdecimal() else None) for c in text)
    more = {"records_digits": True, "samples": samples, "statement": statement}
    return Response(text, tokens, (200, 100), None, "qwen3_vl", **more).encode()


def score(text, estimator="joint"):
    return comprehension.process_results(DOC, [text], estimator=estimator)


def test_exact_box_scores_one_everywhere():
    output = score(answer('{"bbox_2d": [500, 0, 1000, 1000]}'))
    for name in ("acc@0.5", "acc@0.75", "acc@0.9", "mean_iou", "parse_rate", "boxes_per_answer"):
        assert output[name]["score"] == 1.0, name


def test_thresholds_are_inclusive():
    # The left half of the object: IoU is exactly 1/2.
    output = score(answer("[500, 0, 750, 1000]"))
    assert output["mean_iou"]["score"] == 0.5
    assert output["acc@0.5"]["score"] == 1.0
    assert output["acc@0.75"]["score"] == 0.0


def test_pixels_are_those_of_the_image_the_model_saw():
    output = score(answer("[280, 0, 560, 280]", dialect="qwen2_5_vl", model_size=(560, 280)))
    assert output["mean_iou"]["score"] == 1.0


def test_first_box_counts_even_if_a_later_one_is_right():
    output = score(answer("[0, 0, 500, 1000] or [500, 0, 1000, 1000]"))
    assert output["mean_iou"]["score"] == 0.0
    assert output["boxes_per_answer"]["score"] == 2.0


def test_answer_in_another_scale_is_not_rescued():
    assert score(answer("[0.5, 0.0, 1.0, 1.0]"))["mean_iou"]["score"] < 0.01


@pytest.mark.parametrize(
    "text", ["", "there is no such object", "[1, 2, 3", "💥" * 50], ids=["empty", "words", "cut", "emoji"]
)
def test_answer_without_a_box_is_counted_apart(text):
    output = score(answer(text) if text else Response("", (Token("", -0.5),), (200, 100), None, "qwen3_vl").encode())
    assert output["parse_rate"]["score"] == 0.0
    assert output["mean_iou"]["score"] == 0.0
    assert output["mean_iou"]["box"] is None


def test_without_a_box_coordinates_give_no_confidence_but_the_answer_has_one():
    text = answer("no idea")
    silent = score(text, "coordinate_mean")
    assert silent["confidence_rate"]["score"] == 0.0
    output = score(text, "joint")
    assert output["confidence_rate"]["score"] == 1.0
    assert output["mean_iou"]["confidence"]["coordinate_mean"] is None
    assert output["ece"].confidence == pytest.approx(math.exp(-0.1 * len("no idea")), abs=1e-6)
    assert output["ece"].correct == 0.0


def test_every_estimator_is_logged_and_the_named_one_is_used():
    text = "[500, 0, 1000, 1000]"
    for name in ESTIMATORS:
        output = getattr(scored_by, name)(DOC, [everything(text)])
        assert set(output["mean_iou"]["confidence"]) == set(ESTIMATORS)
        assert output["ece"].confidence == output["mean_iou"]["confidence"][name]


def test_evidence_beyond_log_probabilities_has_metrics_of_its_own():
    output = score(everything("[500, 0, 1000, 1000]"))
    confidence = output["mean_iou"]["confidence"]
    assert confidence["expected_iou"] == 1.0
    assert confidence["agreement"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert confidence["agreement_pairwise"] == pytest.approx(0.5 / 3)
    assert confidence["verbalised"] == 0.8
    for name in NEEDS:
        assert output[f"auroc_{name}"].confidence == confidence[name]
    assert output["mean_iou"]["samples"] == {"asked": 3, "usable": 2}
    assert output["sample_parse_rate"]["score"] == pytest.approx(2 / 3)
    assert output["verbalised_rate"]["score"] == 1.0


def test_a_statement_without_a_number_is_missing_and_counted():
    output = score(everything("[500, 0, 1000, 1000]", statement="quite sure"))
    assert output["mean_iou"]["confidence"]["verbalised"] is None
    assert output["mean_iou"]["statement"] == "quite sure"
    assert output["verbalised_rate"]["score"] == 0.0
    assert math.isnan(comprehension.auroc([output["auroc_verbalised"]]))


def test_without_a_box_nothing_agrees_with_it():
    output = score(everything("no idea"))
    confidence = output["mean_iou"]["confidence"]
    assert confidence["expected_iou"] is None
    assert confidence["agreement"] is None
    assert confidence["agreement_pairwise"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("name", list(NEEDS))
def test_what_a_model_was_not_asked_for_is_absent_and_said_how_to_obtain(name):
    output = score(answer("[500, 0, 1000, 1000]"))
    assert name not in output["mean_iou"]["confidence"]
    assert f"auroc_{name}" not in output
    with pytest.raises(ValueError, match=r"needs \(.*\), got evidence for joint"):
        score(answer("[500, 0, 1000, 1000]"), name)


def test_models_that_are_not_ours_are_scored_and_their_calibration_is_missing():
    output = score("[0.5, 0.0, 1.0, 1.0]")
    assert output["acc@0.5"]["score"] == 1.0
    assert not set(comprehension.CALIBRATION) & set(output)


def test_answers_without_a_confidence_are_left_out_of_calibration_and_counted():
    answers = [answer("[500, 0, 1000, 1000]"), answer("no idea"), answer("[0, 0, 500, 1000]")]
    outputs = [score(a, "coordinate_mean") for a in answers]
    alone = [outputs[0]["ece"], outputs[2]["ece"]]
    assert comprehension.ece([output["ece"] for output in outputs]) == comprehension.ece(alone)
    assert comprehension.mean([output["confidence_rate"] for output in outputs]) == pytest.approx(2 / 3)
    assert math.isnan(comprehension.ece([outputs[1]["ece"]]))


def judged(n=997):
    rng = random.Random(0)
    overlaps = [rng.random() for _ in range(n)]
    return [
        GroundingOutcome(f"{k}/0", rng.random(), float(overlap >= 0.5), overlap) for k, overlap in enumerate(overlaps)
    ]


def test_aggregation_does_not_depend_on_order():
    records = judged()
    shuffled = random.Random(1).sample(records, len(records))
    for name, metric in aggregations.CALIBRATION.items():
        assert metric(records) == metric(shuffled), name
    scores = [{"score": record.iou} for record in records]
    assert comprehension.mean(scores) == comprehension.mean(scores[::-1])


def test_table_metrics_are_those_of_the_records():
    records = judged()
    _, confidence, correct, overlap = map(list, zip(*records, strict=True))
    for name, metric in {"smooth_ece": metrics.smooth_ece, "fpr@0.95": metrics.fpr_at_tpr}.items():
        assert aggregations.CALIBRATION[name](records) == pytest.approx(metric(confidence, correct))
    assert aggregations.coverage_at_0_2(records) == metrics.coverage_at_risk(confidence, correct, 0.2)
    assert aggregations.laece_0(records) == pytest.approx(metrics.laece_0(confidence, overlap))
    assert aggregations.ece_floor(records) == metrics.ece_floor(confidence).mean


@pytest.mark.parametrize("file", ["grounding/_grounding.yaml", "grounding/refcocoplus_clean/_reviewed.yaml"])
def test_the_yaml_lists_every_metric_under_its_own_function(file):
    config = task_files.read(Path(registration.tasks_folder()) / file)
    listed = {m["metric"]: m for m in config["metric_list"]}
    for name, aggregate in aggregations.CALIBRATION.items():
        assert getattr(aggregations, listed[name]["aggregation"].rpartition(".")[2]) is aggregate
        assert listed[name]["higher_is_better"] is (name in ("auroc", "aupr_error") or name.startswith("coverage"))
        for by in {*LEARNED, *NEEDS} if name in aggregations.BESIDE else ():
            beside = listed[f"{name}_{by}"]["aggregation"].rpartition(".")[2]
            assert getattr(aggregations, beside) is aggregate


def forced(text, own="[0, 0, 400, 1000]"):
    """An answer, and that of a reference which the model finds a tenth as likely."""
    tokens = tuple(Token(c, -0.1, Alternatives({c: 1.0}) if c.isdecimal() else None) for c in text)
    model = (tokens[0]._replace(logprob=-0.1 + math.log(0.1)), *tokens[1:])
    answer_of_reference = ForcedAnswer(tokens, model, (0.5,) * len(text), (False,) + (True,) * (len(text) - 1))
    written = tuple(Token(c, -0.1) for c in own)
    more = {"records_digits": True, "forced": answer_of_reference}
    return Response(own, written, (200, 100), None, "qwen3_vl", **more).encode()


def test_the_distance_from_a_reference_is_recorded_with_its_own_score():
    text = "[500, 0, 1000, 1000]"
    output = score(forced(text))
    record = output["mean_iou"]["reference"]
    assert record.keys() == {"score", *MEASURES}
    assert (record["score"], record["kl"], record["answer_agreement"]) == (1.0, 0.5, 0.0)
    assert record["answer_probability_change"] == pytest.approx(-0.9 * math.exp(-0.1 * len(text)))
    assert {name: output[name]["score"] for name in MEASURES} == {name: record[name] for name in MEASURES}
    # The reference is right, and the answer lies in the other half.
    assert output["flips_predicted"] == FlipOutcome("7/0", 0.0, 1.0)
    assert score(forced(text, text))["flips_predicted"].flipped == 0.0
    wordy = score(forced("nothing"))
    assert wordy["mean_iou"]["reference"].keys() == {"score", *MEASURES} - {"kl_coordinates", "box_shift"}
    assert "flips_predicted" not in wordy
    assert not {*MEASURES, "flips_predicted"} & score(answer(text)).keys()


def test_flips_are_predicted_whatever_the_order_of_the_records():
    records = [FlipOutcome(str(k), float(k % 5), float(k % 5 == 4)) for k in range(20)]
    random.Random(0).shuffle(records)
    assert aggregations.flips_predicted(records) == 1.0
    assert math.isnan(aggregations.flips_predicted([]))
    assert math.isnan(aggregations.flips_predicted([FlipOutcome("1", 0.5, 0.0)]))


@pytest.mark.parametrize(
    "file",
    [
        "grounding/_grounding.yaml",
        "grounding/_rejection.yaml",
        "grounding/natural_images/_rejection.yaml",
        "grounding/refcocoplus_clean/_reviewed.yaml",
    ],
)
def test_the_yaml_lists_every_measure_of_distance(file):
    config = task_files.read(Path(registration.tasks_folder()) / file)
    listed = {m["metric"]: m for m in config["metric_list"]}
    assert {listed[name]["aggregation"].rpartition(".")[2] for name in MEASURES} == {"mean"}
    assert ("flips_predicted" in listed) is ("rejection" not in file)


@pytest.fixture(scope="module")
def docs():
    return ExpressionDocs(photographs.rows("testB"))


def test_shift_changes_pixels_and_nothing_else(docs):
    place = {"shift": "gaussian_noise", "severity": 3}
    clean, shifted = comprehension.doc_to_visual(docs[0])[0], comprehension.doc_to_visual(docs[0], place)[0]
    assert clean.size == shifted.size
    assert clean.tobytes() != shifted.tobytes()
    assert comprehension.doc_to_visual(docs[0], place)[0].tobytes() == shifted.tobytes()


def test_expressions_of_one_photograph_see_the_same_noise(docs):
    place = {"shift": "gaussian_noise", "severity": 3}
    first, second = docs[0], docs[1]
    assert first["expression"] != second["expression"]
    assert (
        comprehension.doc_to_visual(first, place)[0].tobytes()
        == comprehension.doc_to_visual(second, place)[0].tobytes()
    )


def test_message_keeps_the_generic_question_for_other_models(docs):
    from lmms_eval.protocol import ChatMessages

    messages = comprehension.doc_to_messages(docs[0])
    wish = {"expression": docs[0]["expression"], "original_size": [512, 512], "digits": True}
    assert messages[0]["grounding"] == wish
    text = ChatMessages(messages=messages).to_hf_messages()[0]["content"][1]["text"]
    assert docs[0]["expression"] in text


def test_target_is_the_true_box_in_the_generic_answer_format(docs):
    target = comprehension.doc_to_target(docs[0])
    assert score_of_target(docs[0], target) > 0.97


def score_of_target(doc, target):
    return comprehension.process_results(doc, [target], estimator="joint")["mean_iou"]["score"]


def test_grayscale_photograph_reaches_the_model_as_rgb():
    rows = photographs.rows("testA")
    assert isinstance(rows.features["image"], datasets.Image)
    camera = next(doc for doc in ExpressionDocs(rows) if doc["expression"] == "photographer")
    assert comprehension.doc_to_visual(camera)[0].mode == "RGB"
