"""Zero-shot calibration: what a model writes itself is used where it is a question, and what it saw is told."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.dialects import DIALECTS, dialect_for
from lmms_plugin.quant_backends.calibration.inputs import (
    LONGEST_QUESTION,
    PATIENCE,
    REQUESTS,
    Writer,
    WrittenAnswer,
    build_batches,
    degenerate,
    expect_answers,
    fingerprint,
    question,
    wording,
)
from lmms_plugin.quant_backends.calibration.journal import Journal
from lmms_plugin.quant_backends.calibration.sources import ALLOW, CalibrationSpec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the red circle", "the red circle"),
        ('\n "The red circle on the left." \nIt is big.', "The red circle on the left."),
        ("**What colour is the sky?**", "What colour is the sky?"),
        ("", None),
        ("  \n", None),
        ("?!", None),
        ("7 8 9", None),
        ("[12,34,56,78]", None),
        ("word " * LONGEST_QUESTION, ("word " * LONGEST_QUESTION).strip()),
        ("word " * (LONGEST_QUESTION + 1), None),
    ],
)
def test_what_counts_as_a_question(text, expected):
    assert wording(text, DIALECTS["demo"]) == expected


class Scripted(Writer):
    """Says what it is told to say when asked for a question, and its turn's number when asked anything else."""

    def __init__(self, replies, journal=None, dialect=DIALECTS["demo"]):
        super().__init__(None, None, dialect, journal)
        self.replies, self.asked = iter(replies), []

    def _write(self, image, prompt, tokens):
        self.asked.append(prompt)
        return WrittenAnswer(next(self.replies) if prompt in REQUESTS.values() else f"answer {len(self.asked)}", True)


@pytest.fixture
def plain_images(monkeypatch):
    monkeypatch.setattr(
        "lmms_plugin.quant_backends.calibration.inputs.shown", lambda sample, dialect, processor: sample.image
    )


def drawn(count):
    return CalibrationSpec("self", samples=count).load_samples()


def test_what_a_model_considers_before_it_asks_is_no_question(plain_images):
    writer = Scripted(["<think>Which one? The cat?</think>\n\na blue dog.", "<think>Okay, the user wants"])
    first, second = (writer.complete(sample) for sample in drawn(2))
    assert question(first, DIALECTS["demo"]) == "Locate a blue dog."
    assert second.expression == drawn(2)[1].expression
    assert writer.own == 1


def test_expressions_are_asked_in_the_dialect_and_questions_as_they_are(plain_images):
    writer = Scripted(["a blue dog.", "grey noise", "How many dogs are there?", "Why?"])
    first, second, third, fourth = (writer.complete(sample) for sample in drawn(4))
    dialect = DIALECTS["demo"]
    assert [question(sample, dialect) for sample in (first, second, third, fourth)] == [
        "Locate a blue dog.",
        "Locate grey noise.",
        "How many dogs are there?",
        "Why?",
    ]
    assert writer.asked[1] == "Locate a blue dog."
    assert first.answer == "answer 2"
    assert writer.own == 4


def test_a_model_that_only_speaks_its_dialect_keeps_the_drawn_expressions_and_is_not_asked_for_ever(plain_images):
    writer = Scripted(["[12,34,56,78]"] * PATIENCE)
    samples = drawn(PATIENCE + 3)
    completed = [writer.complete(sample) for sample in samples]
    assert [sample.expression for sample in completed] == [sample.expression for sample in samples]
    assert all(sample.answer for sample in completed)
    assert writer.own == 0
    assert sum(prompt in REQUESTS.values() for prompt in writer.asked) == PATIENCE


def test_what_was_written_is_not_written_again(plain_images, tmp_path):
    replies = ["a dog", "[1,2,3,4]", "What is it?", "", "a cat", "a cow"]
    whole = Scripted(replies)
    expected = [whole.complete(sample) for sample in drawn(6)]
    cut_off = Scripted(replies, Journal(tmp_path, {}))
    for sample in drawn(3):
        cut_off.complete(sample)
    resumed = Scripted(replies[3:], Journal(tmp_path, {}))
    found = [resumed.complete(sample) for sample in drawn(6)]
    assert [sample[1:4] for sample in found] == [sample[1:4] for sample in expected]
    assert resumed.own == whole.own
    assert len(resumed.asked) == 6


@pytest.fixture(scope="module")
def demo():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    return model, processor


def prepared(demo, text, samples=6):
    model, processor = demo
    spec = CalibrationSpec.parse(text, samples=samples)
    return build_batches(model, processor, spec, spec.load_samples(), DIALECTS["demo"], keep_logits=False)


def test_the_demo_model_speaks_its_dialect_alone(demo):
    _, report = prepared(demo, "self")
    assert (report.samples, report.own_questions, report.own_answers) == (6, 0, 6)
    assert (report.degenerate, report.unfinished) == ({}, 0)


def test_a_budget_of_tokens_ends_the_samples(demo):
    whole, everything = prepared(demo, "noise")
    lengths = [batch["input_ids"].shape[1] for batch in whole]
    budget = sum(lengths[:3]) + 1
    batches, report = prepared(demo, f"noise:tokens={budget}")
    assert (report.samples, report.tokens) == (4, sum(lengths[:4]))
    assert fingerprint(batches) == fingerprint(whole[:4]) != fingerprint(whole)
    assert report.sha256 != everything.sha256
    assert report.source == f"noise:tokens={budget}"


def test_a_budget_that_is_not_reached_is_told(demo):
    from loguru import logger

    messages = []
    handle = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    try:
        _, report = prepared(demo, "noise:tokens=1000000", samples=2)
    finally:
        logger.remove(handle)
    assert report.samples == 2
    assert len(messages) == 1
    assert f"2 calibration samples hold {report.tokens} tokens, fewer than the 1000000 asked for" in messages[0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        ("\n \n\n", "blank"),
        ("the cat " * 9, "looping"),
        ("A cat. " + "It is a cat. " * 5, "looping"),
        ("!" * 40, "looping"),
        ("There is a red circle in the upper left corner. " * 3, "looping"),
        ("There is a red circle in the upper left corner. " * 2, None),
        ("7,7,7,7,7,7,7,7,7,7,7,7", "looping"),
        ("[12,34,56,78]", None),
        ("[50,50,50,50]", None),
        ("A red circle, a red square and a red triangle on a white wall.", None),
        ("no no no", None),
        (
            "It goes na na na na na na na, then the verse tells how the two of them met in a small town by the sea.",
            None,
        ),
    ],
)
def test_answers_that_say_nothing(text, kind):
    assert degenerate(text) == kind


def written(texts, finished=True):
    return [WrittenAnswer(text, finished) for text in texts]


def test_a_model_that_mostly_says_nothing_is_refused_and_told_what_helps():
    spec = CalibrationSpec.parse("self")
    assert expect_answers(written(["a dog", "the wall"]), spec) == {}
    assert expect_answers([], spec) == {}
    assert expect_answers(written(["a dog", "\n\n"]), spec) == {"blank": 1}
    mostly = written(["a dog", "\n\n", "", "cat " * 20])
    message = r"3 of 4 answers .* \(1 blank, 1 empty, 1 looping\), as '\\n\\n': .*photographs.*self:degenerate=allow"
    with pytest.raises(ValueError, match=message):
        expect_answers(mostly, spec)
    allowed = CalibrationSpec.parse("self:degenerate=allow")
    assert expect_answers(mostly, allowed) == {"blank": 1, "empty": 1, "looping": 1}
    # Long answers are cut off, which is no fault.
    assert expect_answers(written(["a dog", "a wall"], finished=False), spec) == {}


def test_degenerate_answers_may_be_allowed_for_self_alone():
    assert str(CalibrationSpec.parse("self:degenerate=allow")) == "self:degenerate=allow"
    assert str(CalibrationSpec.parse("self:degenerate=refuse")) == "self"
    with pytest.raises(ValueError, match="degenerate must be allow or refuse, got 'yes'"):
        CalibrationSpec.parse("self:degenerate=yes")
    with pytest.raises(ValueError, match="unknown calibration option 'degenerate'"):
        CalibrationSpec.parse("noise:degenerate=allow")


def test_a_model_that_loops_is_refused_before_anything_is_fitted_to_it(checkpoint):
    """Random weights write the same over and over."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen3_vl"))
    torch.nn.init.zeros_(model.lm_head.weight)
    processor = AutoProcessor.from_pretrained(checkpoint("qwen3_vl"))

    def build(text):
        spec = CalibrationSpec.parse(text, samples=3)
        return build_batches(model, processor, spec, spec.load_samples(), dialect_for("qwen3_vl"), keep_logits=False)

    with pytest.raises(ValueError, match=r"3 of 3 answers that the model wrote itself .* say nothing \(3 looping\)"):
        build("self")
    _, report = build("self:degenerate=allow")
    assert (report.own_answers, report.degenerate, report.unfinished) == (3, {"looping": 3}, 3)


@pytest.mark.parametrize("family", ["qwen3_vl", "paligemma"])
def test_any_family_asks_itself(checkpoint, family):
    """Of random weights one can only say that what they write reaches the model again, the same way each time."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    spec = CalibrationSpec("self", samples=3, degenerate=ALLOW)
    one, other = (
        build_batches(model, processor, spec, spec.load_samples(), dialect_for(family), keep_logits=False)
        for _ in range(2)
    )
    assert fingerprint(one[0]) == fingerprint(other[0])
    assert one[1] == other[1]
    assert one[1].samples == 3
