import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.protocol.response import MARKER, Alternatives, Response, Token

texts = st.text(st.characters(codec="utf-8"), max_size=12)
sizes = st.none() | st.tuples(st.integers(1, 10**5), st.integers(1, 10**5))
logprobs = st.floats(-1e4, 0.0).map(lambda value: round(value, 6))


shares = st.floats(0.0, 1.0).map(lambda value: round(value, 5))
digits = st.builds(Alternatives, st.dictionaries(st.text("0123456789", min_size=1, max_size=4), shares), shares)


@st.composite
def responses(draw: st.DrawFn) -> Response:
    recorded = draw(st.booleans())
    token = st.builds(Token, texts | st.just(MARKER), logprobs, st.none() | digits if recorded else st.none())
    tokens = tuple(draw(st.lists(token, max_size=8)))
    return Response(
        "".join(token.text for token in tokens) if tokens else draw(texts),
        tokens,
        draw(sizes),
        draw(sizes),
        draw(st.none() | texts),
        draw(st.dictionaries(texts, shares, max_size=2)),
        recorded,
        draw(st.none() | st.lists(texts, max_size=3).map(tuple)),
        draw(st.none() | texts),
    )


@given(responses())
def test_an_encoded_response_decodes_to_itself(response):
    assert Response.decode(response.encode()) == response


@given(responses().filter(lambda response: response.tokens))
def test_lmms_eval_stripping_the_answer_does_no_harm(response):
    assert Response.decode(response.encode().strip()) == response


@given(responses())
def test_the_answer_comes_first_and_the_trailer_is_one_ascii_line(response):
    text, _, line = response.encode().rpartition(MARKER)
    assert text == response.text + "\n"
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line)["tokens"] == [token.text for token in response.tokens]


@given(st.text().filter(lambda text: MARKER not in text))
def test_an_answer_of_another_model_decodes_to_its_text(text):
    assert Response.decode(text) == Response(text)


def test_an_empty_answer_keeps_the_log_probability_of_ending_at_once():
    response = Response("", (Token("", -0.25),), (640, 480), None, "qwen2_vl")
    assert Response.decode(response.encode().strip()) == response


def test_log_probabilities_are_rounded_to_six_decimals():
    response = Response("7", (Token("7", -1 / 3),))
    assert Response.decode(response.encode()).tokens == (Token("7", -0.333333),)


def test_tokens_that_do_not_add_up_to_the_text_are_refused():
    with pytest.raises(ValueError, match="add up"):
        Response("[1, 2]", (Token("[1,", -0.1), Token("2]", -0.1)))


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_log_probability_that_is_not_finite_is_not_written(logprob):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Response("7", (Token("7", logprob),)).encode()


GOOD = {"tokens": ["7"], "logprobs": [-0.5], "original_size": [640, 480], "model_size": None, "dialect": "demo"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        json.dumps({**GOOD, "logprobs": []}),
        json.dumps({**GOOD, "logprobs": ["-0.5"]}),
        json.dumps({**GOOD, "logprobs": [math.nan]}),
        json.dumps({**GOOD, "logprobs": None}),
        json.dumps({**GOOD, "tokens": [7]}),
        json.dumps({**GOOD, "original_size": [640]}),
        json.dumps({**GOOD, "original_size": [640.5, 480]}),
        json.dumps({**GOOD, "model_size": 640}),
        json.dumps({**GOOD, "extra": 1}),
        json.dumps({**GOOD, "digits": {"0": {"7": 0.5}}}),
        json.dumps({**GOOD, "digits": {"0": [{"seven": 0.5}, 0.0]}}),
        json.dumps({**GOOD, "digits": {"0": [{"7": 1.5}, 0.0]}}),
        json.dumps({**GOOD, "digits": {"one": [{}, 0.0]}}),
        json.dumps({**GOOD, "samples": "7"}),
        json.dumps({**GOOD, "samples": [7]}),
        json.dumps({**GOOD, "statement": 7}),
        json.dumps(GOOD)[:-1],
    ],
)
def test_a_damaged_trailer_is_an_error_that_shows_it(line):
    with pytest.raises(ValueError, match="trailer of an answer is damaged"):
        Response.decode(f"7\n{MARKER}{line}")


@given(st.text())
def test_decoding_gives_a_response_or_a_value_error_for_any_string(text):
    with contextlib.suppress(ValueError):
        Response.decode(f"7\n{MARKER}{text}")
