"""Errors of several lines: all problems at once, each once, in bounds."""

import pickle

import pytest

from lmms_plugin.utils.reading.problems import MOST_LINES, Problems, SeveralErrors, lines_of, refusal


def test_one_problem_is_an_error_like_any_other():
    assert type(refusal(["a", "a"])) is ValueError
    assert lines_of(refusal(["a"])) == ("a",)
    assert lines_of(OSError("b\nc")) == ("b c",)


def test_several_problems_are_lines_that_survive_a_process():
    error = pickle.loads(pickle.dumps(refusal(["a", "b", "a"])))
    assert type(error) is SeveralErrors
    assert lines_of(error) == ("a", "b")
    assert str(error) == "a\nb"


def test_a_flood_is_counted():
    told = lines_of(refusal(f"problem {number}" for number in range(MOST_LINES + 7)))
    assert told[MOST_LINES - 1 :] == (f"problem {MOST_LINES - 1}", "and 7 more")
    assert len(lines_of(refusal(map(str, range(MOST_LINES))))) == MOST_LINES


def test_checks_go_on_after_a_failure():
    problems = Problems()
    problems.expect_none()
    with problems.collected():
        raise ValueError("a")
    with problems.collected():
        raise refusal(["b", "c"])
    with pytest.raises(TypeError), problems.collected():
        raise TypeError("none of the user's making")
    with pytest.raises(SeveralErrors, match=r"^a\nb\nc$"):
        problems.expect_none()
