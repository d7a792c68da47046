"""Reasoning and answer apart: by many families' tags, by what the prompt opened, and wherever answers are read."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmms_plugin.analysis.records import REJECTION
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.reasoning import ANSWER, REASONING, left_open, separate, tokens_among
from lmms_plugin.protocol.response import Response, Token
from lmms_plugin.tasks.captions import captioning
from lmms_plugin.tasks.grounding import comprehension, rejection
from lmms_plugin.tasks.vqa import answering

HARMONY = "<|channel|>analysis<|message|>"
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
PAIRS = [
    *(tags.tokens for tags in REASONING if len(tags.tokens) == 2),
    ("<Think>", "</Think>"),
    ("<|channel>thought\n", "<channel|>"),
    (HARMONY, FINAL),
    ("<|channel|>commentary to=functions.look <|constrain|>json<|message|>", FINAL),
]
WRAPPED = [tags.tokens for tags in ANSWER]
pair = st.sampled_from(PAIRS)
# Text that can make no tag: every one needs one of the characters left out.
plain = st.text(st.characters(codec="utf-8", exclude_characters="<>[]◁▷|"), max_size=20)
soup = st.lists(
    st.sampled_from(
        [tag for tags in [*PAIRS, *WRAPPED] for tag in tags] + ["no", " ", "[1,2]", "Thought:", "\nAnswer:"]
    )
).map("".join)


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
class TestTags:
    def test_the_answer_is_what_follows_the_reasoning(self, opening, closing):
        parts = separate(f"{opening}red{closing}\n\nyes")
        assert (parts.answer_text, parts.finished, parts.reasoned) == ("yes", True, True)
        assert parts.reasoning_text == f"{opening}red{closing}\n\n"

    def test_a_tag_that_the_template_opened_is_closed_by_the_answer(self, opening, closing):
        assert separate(f"red{closing}yes", opening).answer_text == "yes"
        # Where nobody knows what the template did, the closing tag alone tells.
        assert separate(f"red{closing}yes").answer_text == "yes"

    def test_reasoning_that_does_not_end_is_no_answer(self, opening, closing):
        for parts in (separate(f"{opening}red, no, blue"), separate("red, no, blue", opening)):
            assert (parts.answer_text, parts.said_text, parts.finished) == ("", "", False)

    def test_reasoning_taken_up_again_is_no_answer(self, opening, closing):
        assert not separate(f"{opening}a{closing}b{opening}c").finished
        assert separate(f"{opening}a{closing}b{opening}c{closing}d").answer_text == "d"

    def test_another_familys_tag_closes_nothing(self, opening, closing):
        other = next(end for start, end in PAIRS if end.lower() != closing.lower() and start.lower() != opening.lower())
        assert not separate(f"{opening}red{other}blue").finished

    def test_a_prompt_that_leaves_it_open_is_told_from_one_that_closes_it(self, opening, closing):
        assert left_open(f"<|assistant|>\n{opening}\n") in (opening, opening.rstrip(), "<|channel>")
        assert left_open(f"<|assistant|>\n{opening}\n\n{closing}\n\n") == ""
        assert left_open("<|im_start|>assistant\n") == ""

    def test_an_answer_that_nothing_follows_was_given_before(self, opening, closing):
        for text in (
            f"yes {opening}red{closing}",
            f"yes\n{opening}red{closing}\n",
            f"{opening}a{closing}yes{opening}b{closing} ",
        ):
            parts = separate(text)
            assert (parts.said_text, parts.answer_text, parts.finished, parts.reasoned) == ("yes", "yes", True, True)
            assert "yes" not in parts.reasoning_text
        assert separate(f"Let me see. {opening}red{closing}blue").answer_text == "blue"
        # What is not told to be over may still change the answer, and what stands before a closing tag is reasoning.
        assert separate(f"yes {opening}red").answer_text == ""
        assert separate(f"yes {closing}").answer_text == ""


LABELLED = [
    "Thought: the sign is red.\nAnswer: stop",
    "Thought: the sign is red. Answer: stop",
    "**Thought:** the sign is red,\n\n**Answer:** stop",
    "### Reasoning: it is red\n### Final Answer: stop",
    "\nTHOUGHT: The question: is there an Answer? Yes\nANSWER: stop",
    "<think>a</think>Thought: b\nAnswer: stop",
    "Thought: a\nAnswer: Thought: b\nAnswer: stop",
    "Thought: a\nAnswer: <answer>stop</answer>",
]
UNLABELLED = [
    "Thought: a bubble above the man",
    "A sign that says Thought: think first.\nAnswer: later",
    "Answer: stop",
    "Answer: the bubble says Thought: hm",
    "Thoughtful people answer: no",
    "Thought: the label says the Answer: box is empty",
    "the analysis of a reflection in the answer: none",
    "Thoughts and reasoning.\nAnswer: stop",
]


@pytest.mark.parametrize("text", LABELLED)
def test_labels_separate_as_tags_do(text):
    parts = separate(text)
    assert (parts.answer_text, parts.finished, parts.reasoned) == ("stop", True, True)
    assert parts.reasoning_text + parts.said_text == text


@pytest.mark.parametrize("text", UNLABELLED)
def test_words_of_an_answer_are_no_labels(text):
    parts = separate(text)
    assert (parts.said_text, parts.answer_text, parts.reasoned) == (text, text, False)


def test_a_model_that_answers_first_is_scored_by_its_answer():
    given = response("", "yes", samples=("yes<think>red</think>",))
    text = "<think>red, or blue</think>"
    given = replace(
        given, text=given.text + text, tokens=(*given.tokens[:-1], *(Token(c, -5.0) for c in text), Token("", -0.2))
    )
    record = answering.scored_by_joint(VQA_DOC, [given.encode()])["accuracy"]
    assert (record["accuracy"], record["answer"], record["reasoning"]) == (1.0, "yes", text)
    assert record["confidence"]["word_joint"] == pytest.approx(math.exp(-0.3))
    assert record["confidence"]["agreement"] == 1.0
    assert "".join(token.text for token in given.spoken.tokens) == "yes"
    boxes = comprehension.process_results(BOX_DOC, [boxed("", RIGHT).encode()], "joint")["mean_iou"]
    first = f"{RIGHT}\n<think>{WRONG}?</think>"
    assert comprehension.process_results(BOX_DOC, [first], "joint")["mean_iou"]["answer"] == boxes["answer"]


@pytest.mark.parametrize(("opening", "closing"), WRAPPED)
def test_tags_around_the_answer_are_no_part_of_it(opening, closing):
    assert separate(f"<think>a</think>It is {opening}red{closing}.").answer_text == "red"
    assert separate(f"{opening}red{closing}").answer_text == "red"
    # Cut off within the answer, it is as far as it goes; of two, the first counts.
    assert separate(f"{opening}red and gre").answer_text == "red and gre"
    assert separate(f"{opening}red{closing}{opening}blue{closing}").answer_text == "red"


def test_nested_reasoning_ends_with_its_last_closing_tag():
    assert separate("<think>a<think>b</think>c</think>d").answer_text == "d"
    assert separate("<think>a</think>b<|channel>thought\nc<channel|>d").answer_text == "d"


def test_the_end_of_a_turn_is_no_part_of_an_answer_in_channels():
    assert separate(f"{HARMONY}a{FINAL}yes<|return|>").answer_text == "yes"
    assert separate("yes<|end|>").answer_text == "yes<|end|>"


@pytest.mark.parametrize("opened", ["<answer>", "</think>", "think", "<think>red"])
def test_only_a_tag_that_opens_reasoning_can_have_been_opened(opened):
    with pytest.raises(ValueError, match="expected a tag that opens reasoning"):
        separate("red", opened)
    with pytest.raises(ValueError, match="expected a tag that opens reasoning"):
        Response("red", opened=opened)


@given(plain)
def test_a_text_without_tags_is_its_own_answer_to_the_letter(text):
    parts = separate(text)
    assert (parts.said_text, parts.answer_text, parts.reasoning_text) == (text, text, "")
    assert (parts.finished, parts.reasoned) == (True, False)


@given(pair, plain, plain, st.booleans())
def test_reasoning_is_never_returned_as_answer(tags, thought, said, template):
    opening, closing = tags
    text = ("" if template else opening) + thought + closing + said
    parts = separate(text, opening if template else "")
    assert parts.said_text == said.lstrip()
    assert parts.reasoning_text + parts.said_text == text
    before = separate(f"{said}{opening}{thought}{closing}")
    assert before.said_text == (said.rstrip() and said.strip())
    unfinished = separate(("" if template else opening) + thought, opening if template else "")
    assert (unfinished.answer_text, unfinished.finished) == ("", False)


@given(soup, st.sampled_from(["", *(opening for opening, _ in PAIRS)]))
def test_parts_make_up_the_whole_whatever_the_text(text, opened):
    parts = separate(text, opened)
    (said, end), (first, last) = parts.said, parts.answer
    assert 0 <= said <= first <= last <= end <= len(text)
    assert parts.finished or parts.said_text == ""
    assert parts.reasoned or parts.said_text == text
    # What was found to be said holds no more reasoning.
    assert not separate(parts.said_text).reasoned
    # What the prompt opened is as if the model had.
    assert separate(opened + text).said_text == parts.said_text


@given(st.lists(plain | st.sampled_from([tag for tags in PAIRS for tag in tags]), max_size=8), st.data())
def test_tokens_of_an_answer_are_its_text_and_what_ends_it(pieces, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    bounds = zip([0, *cuts], [*cuts, len(text)], strict=True)
    tokens = (*(Token(text[a:b], -float(i)) for i, (a, b) in enumerate(bounds)), Token("", -99.0))
    response = Response(text, tokens)
    spoken, start = response.spoken
    if not response.parts.finished:
        assert spoken == ()
        return
    assume(response.parts.said[1] == len(text))
    written = "".join(token.text for token in spoken)
    assert text[start:] == written
    assert written.endswith(response.parts.said_text)
    assert spoken[-1] == tokens[-1]
    # No token in front of the answer counts, but one that straddles its edge.
    assert not spoken[0].text or start + len(spoken[0].text) > response.parts.said[0]


def test_special_tokens_that_are_tags_are_told_from_others_of_the_same_spelling():
    assert tokens_among(["[THINK]", "[/THINK]", "<s>"], REASONING) == {"[THINK]", "[/THINK]"}
    assert tokens_among(["<|end|>", "<|start|>", "[THINK]"], REASONING) == set()
    assert tokens_among(["<|begin_of_box|>", "<|end_of_box|>"], ANSWER) == {"<|begin_of_box|>", "<|end_of_box|>"}


# A 200 x 100 image whose object covers its right half.
BOX_DOC = {"bbox": [100.0, 0.0, 100.0, 100.0], "width": 200, "height": 100}
BOX_DOC |= {"expression": "right half", "expression_id": "7/0", "image_id": "photo"}
VQA_DOC = {"dataset": "vqav2", "question_id": "q", "image_id": "i", "part": "test", "question": "Is it red?"}
VQA_DOC |= {"answers": ["yes"] * 10}
WRONG, RIGHT = "[0, 0, 500, 1000]", "[500, 0, 1000, 1000]"


def response(reasoning, said, opened="", **more):
    """An answer whose reasoning is improbable and whose words are certain but for the end."""
    tokens = [*(Token(c, -5.0) for c in reasoning), *(Token(c, -0.1) for c in said), Token("", -0.2)]
    return Response(reasoning + said, tuple(tokens), opened=opened, **more)


def boxed(reasoning, said, opened="", **more):
    return response(reasoning, said, opened, original_size=(200, 100), dialect="qwen3_vl", **more)


class TestBoxes:
    @pytest.mark.parametrize(
        ("reasoning", "opened"),
        [(f"<think>{WRONG}</think>", ""), (f"{WRONG}</think>\n", "<think>"), (f"{WRONG}</think>", "")],
    )
    def test_what_a_model_considers_is_not_what_it_answers(self, reasoning, opened):
        output = comprehension.process_results(BOX_DOC, [boxed(reasoning, RIGHT, opened).encode()], "joint")
        alone = comprehension.process_results(BOX_DOC, [boxed("", RIGHT).encode()], "joint")
        record, bare = output["mean_iou"], alone["mean_iou"]
        assert record["score"] == 1.0
        assert record["boxes"] == 1
        assert record["answer"] == RIGHT
        assert record["reasoning"] == reasoning
        assert record["confidence"] == pytest.approx(bare["confidence"])
        assert output["unfinished_rate"]["score"] == 0.0
        assert "reasoning" not in bare

    @pytest.mark.parametrize(("text", "opened"), [(f"<think>{RIGHT}, or", ""), (f"{RIGHT}, or", "<think>")])
    def test_reasoning_that_does_not_end_is_scored_by_nothing_in_it(self, text, opened):
        given = boxed(text, "", opened, samples=(RIGHT, RIGHT), statement="90", confidence={"selector": 0.9})
        output = comprehension.process_results(BOX_DOC, [given.encode()], "coordinate_mean")
        record = output["mean_iou"]
        assert (record["score"], record["box"], record["boxes"], record["answer"]) == (0.0, None, 0, "")
        assert output["parse_rate"]["score"] == 0.0
        assert output["unfinished_rate"]["score"] == 1.0
        assert output["confidence_rate"]["score"] == 0.0
        assert set(record["confidence"].values()) == {None}

    def test_samples_are_read_as_the_answer_is(self):
        sampled = (f"{WRONG}</think>{RIGHT}", f"{RIGHT}", f"{RIGHT}</think>{WRONG}")
        record = comprehension.process_results(
            BOX_DOC, [boxed("a</think>", RIGHT, "<think>", samples=sampled).encode()], "joint"
        )["mean_iou"]
        assert record["samples"] == {"asked": 3, "usable": 2}
        assert record["confidence"]["agreement"] == pytest.approx(1 / 3)

    def test_an_answer_that_does_not_come_rejects_nothing(self):
        doc = BOX_DOC | {"pair": "7/0", "matches": False, "original_expression": "left half", "shifted_rate": 1.0}
        judge = rejection.scored_by_coordinate_mean
        refusal = judge(doc, [boxed("", "There is none.").encode()])
        assert refusal["confidence_falls"].confidence == 0.0
        unfinished = judge(doc, [boxed("<think>There is", "").encode()])
        assert unfinished["confidence_rate"]["score"] == 0.0
        assert not {"confidence_falls", "rejection_auroc"} & set(unfinished)
        assert unfinished[REJECTION.record]["confidence"]["coordinate_mean"] is None

    def test_models_of_other_packages_are_read_by_their_tags(self):
        text = "<think>[0.0, 0.0, 0.5, 1.0]</think>[0.5, 0.0, 1.0, 1.0]"
        assert comprehension.process_results(BOX_DOC, [text], "joint")["mean_iou"]["score"] == 1.0


class TestWords:
    @pytest.mark.parametrize(("opening", "closing"), PAIRS)
    def test_the_word_behind_the_reasoning_is_scored(self, opening, closing):
        output = answering.scored_by_joint(VQA_DOC, [response(f"{opening}red{closing}", "yes").encode()])
        record, bare = (
            output["accuracy"],
            answering.scored_by_joint(VQA_DOC, [response("", "yes").encode()])["accuracy"],
        )
        assert record["accuracy"] == record["accuracy_reliable_vqa"] == 1.0
        assert record["answer"] == "yes"
        assert record["confidence"] == pytest.approx(bare["confidence"])
        assert record["confidence"]["word_joint"] == pytest.approx(math.exp(-0.3))

    def test_the_word_in_its_box_is_scored_and_no_tag_is_a_word(self):
        given = response("<think>red</think>", "<|begin_of_box|>yes<|end_of_box|>")
        record = answering.scored_by_joint(VQA_DOC, [given.encode()])["accuracy"]
        assert record["accuracy"] == 1.0
        assert record["confidence"]["word_joint"] == pytest.approx(math.exp(-0.3))

    @pytest.mark.parametrize("gold", ["yes", ""])
    def test_reasoning_that_does_not_end_is_wrong_and_counted(self, gold):
        doc = VQA_DOC | {"answers": [gold] * 10}
        output = answering.scored_by_joint(doc, [response("yes", "", "<think>").encode()])
        assert output["accuracy"]["accuracy"] == 0.0
        assert output["unfinished_rate"]["score"] == 1.0
        assert output["confidence_rate"]["score"] == 0.0
        assert set(output["accuracy"]["confidence"].values()) == {None}
        assert "ece" not in output

    def test_samples_and_statement_are_read_as_the_answer_is(self):
        given = response("a</think>", "yes", "<think>", samples=("no</think>Yes.", "yes"), statement="20?</think>\n70")
        confidence = answering.scored_by_joint(VQA_DOC, [given.encode()])["accuracy"]["confidence"]
        assert confidence["agreement"] == 0.5
        assert confidence["verbalised"] == 0.7

    def test_captions(self):
        doc = {"image_id": "1", "captions": ["a dog"]}
        rows = captioning.process_results(doc, [response("A cat?</think>\n", "A dog.", "<think>").encode()])
        assert rows["CIDEr"]["caption"] == "A dog."
        assert rows["CIDEr"]["confidence"]["first"] == pytest.approx(math.exp(-0.1))
        rows = captioning.process_results(doc, ["<think>A cat"])
        assert (rows["CIDEr"]["caption"], rows["unfinished_rate"]["score"]) == ("", 1.0)


def test_what_the_prompt_opened_travels_with_the_answer():
    given = response("a</think>", "yes", "<think>")
    assert Response.decode(given.encode()) == given
    assert "opened" not in replace(given, opened="").encode()
    with pytest.raises(ValueError, match="damaged"):
        Response.decode(given.encode().replace("\\u003cthink>", "\\u003cb>"))


def test_a_rate_of_unfinished_answers_names_the_remedy():
    from loguru import logger

    said: list[str] = []
    handle = logger.add(said.append, format="{message}")
    try:
        assert comprehension.unfinished([{"score": 0.0}, {"score": 0.0}]) == 0.0
        assert said == []
        assert comprehension.unfinished([{"score": 1.0}, {"score": 0.0}]) == 0.5
    finally:
        logger.remove(handle)
    assert len(said) == 1
    assert "max_new_tokens=" in said[0]


@pytest.mark.parametrize("name", ["qwen3_vl", "glm4v"])
def test_every_dialect_skips_the_same_reasoning(name):
    sizes = {"original_size": (200, 100), "model_size": None}
    for opening, closing in PAIRS:
        text = f"{opening}[[1,2,3,4]]{closing} [[500,0,1000,1000]]"
        parsed = DIALECTS[name].parse(text, **sizes)
        assert parsed.count == 1
        assert [text[slice(*span)] for span in parsed.coordinates] == ["500", "0", "1000", "1000"]
