"""VQA accuracy: closed form, and the normalisation of the challenge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

from lmms_plugin.tasks.vqa import accuracy as module
from lmms_plugin.tasks.vqa.accuracy import normalise, vqa_accuracy


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people(matches, expected):
    given = ["cat"] * matches + [f"dog {i}x" for i in range(10 - matches)]
    assert vqa_accuracy("cat", given) == expected


@given(st.integers(2, 12), st.data())
def test_is_the_mean_over_whom_is_left_out(people, data):
    answers = data.draw(st.lists(st.sampled_from(["cat", "dog", "fish"]), min_size=people, max_size=people))
    others = [[a for j, a in enumerate(answers) if j != i] for i in range(people)]
    expected = sum(min(1, rest.count("cat") / 3) for rest in others) / people
    assert vqa_accuracy("cat", answers) == pytest.approx(expected)


def test_one_person_cannot_be_left_out():
    with pytest.raises(ValueError, match="at least two people"):
        vqa_accuracy("cat", ["cat"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("  The\nCat ", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("10,000", "10000"),
        ("3.5", "3.5"),
        ("St. Louis.", "st louis"),
        ("red, white and blue", "red white and blue"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("7-up", "7-up"),
        ("(no)", "no"),
        ("!!", ""),
        ("!", "!"),
        ("1,,000,5", "10005"),
        ("red , white;blue", "red white blue"),
        ("a,1", "a,1"),
        ("('twas)", "('twas"),
        ("é!", "é!"),
        ("é!?", "é"),
        ("isnt", "isn't"),
        ("its", "its"),
        ("the", ""),
        ("", ""),
    ],
    ids=repr,
)
def test_normalisation(answer, expected):
    assert normalise(answer) == expected


def test_contractions_are_those_of_the_challenge():
    table = {lost: whole for lost, whole in EvalAIAnswerProcessor.CONTRACTIONS.items() if lost == lost.lower() != whole}
    assert table == module.CONTRACTIONS


words = st.text("abcdegnot '0123456789", max_size=20)


@given(words)
def test_agrees_with_the_challenge_where_there_is_no_punctuation(text):
    """lmms-eval's copy of the server's rules treats punctuation, and 's, in another way."""
    words = " ".join(text.split())
    assert normalise(words) == EvalAIAnswerProcessor().process_digit_article(words)


@given(st.text(max_size=12))
def test_an_answer_that_all_gave_is_right_in_both_readings(text):
    for verbatim in (False, True):
        assert vqa_accuracy(text, [text] * 10, verbatim_if_unanimous=verbatim) == 1.0


def test_unanimous_answers_are_compared_letter_by_letter_on_request():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1.0
    assert vqa_accuracy("Yes.", ["yes"] * 10, verbatim_if_unanimous=True) == 0.0
    assert vqa_accuracy("yes\n", ["yes"] * 10, verbatim_if_unanimous=True) == 1.0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"], verbatim_if_unanimous=True) == 1.0
