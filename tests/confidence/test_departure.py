"""Departure from a reference: planted distributions with known divergences, shifts and bounds."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import entropy

from lmms_plugin.confidence.departure import MEASURES, departure, kept_departure
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.response import Alternatives, ForcedAnswer, Response, Token

DIALECT = DIALECTS["qwen3_vl"]
SIZES = {"original_size": (640, 480), "model_size": None}
READ = partial(DIALECT.boxes, **SIZES)
TEXT = "[100, 200, 300, 400]"


def written(text, logprob=0.0, **uncertain):
    """One token per character and an end; digits are certain but for those given (`p1={"1": 0.5, "9": 0.5}`)."""
    tokens = []
    for position, character in enumerate(text):
        chosen = uncertain.get(f"p{position}", {character: 1.0})
        digits = Alternatives(chosen) if character.isdecimal() else None
        tokens.append(Token(character, math.log(chosen[character]) if digits else logprob, digits))
    return (*tokens, Token("", 0.0))


def spans(text=TEXT):
    return DIALECT.parse(text, **SIZES).coordinates


def said(tokens):
    return Response("".join(token.text for token in tokens), tokens, (640, 480), None, "qwen3_vl", records_digits=True)


def forced(reference, model, kl=0.0, agreed=True):
    size = len(reference)
    apart = kl if isinstance(kl, tuple) else (kl,) * size
    marks = agreed if isinstance(agreed, tuple) else (agreed,) * size
    answer = ForcedAnswer(reference, model, apart, marks)
    return Response("nothing", (), (640, 480), None, "qwen3_vl", records_digits=True, forced=answer)


def test_a_model_is_nowhere_from_itself():
    tokens = written(TEXT, p1={"1": 0.7, "2": 0.3})
    found = departure(forced(tokens, tokens), spans(), READ)
    assert found.keys() == MEASURES.keys()
    assert found.pop("token_agreement") == found.pop("answer_agreement") == 1.0
    assert set(found.values()) == {0.0}


def test_divergences_and_marks_are_averaged_over_tokens_and_over_coordinates():
    tokens = written(TEXT)
    kl = tuple(1.0 if token.text.isdecimal() else 0.0 for token in tokens)
    agreed = tuple(token.text != "2" for token in tokens)
    found = departure(forced(tokens, tokens, kl, agreed), spans(), READ)
    assert found["kl"] == pytest.approx(12 / len(tokens))
    assert found["kl_coordinates"] == pytest.approx(1.0)
    assert found["token_agreement"] == pytest.approx(1 - 1 / len(tokens))
    assert found["answer_agreement"] == 0.0


def test_the_answer_s_probability_changes_by_what_the_model_gives_it():
    reference, model = written(TEXT, p1={"1": 0.8, "2": 0.2}), written(TEXT, p1={"1": 0.2, "2": 0.8})
    assert departure(forced(reference, model), spans(), READ)["answer_probability_change"] == pytest.approx(-0.6)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_box_shifts_by_the_mass_that_moves_times_how_far(share):
    # 100 becomes 200 with that probability: a tenth of the width, of one of four sides.
    reference, model = written(TEXT), written(TEXT, p2={"0": 1 - share, "9": share})
    found = departure(forced(reference, model), spans(), READ)["box_shift"]
    # The endings of 19_ are spread evenly, 94.5 further on average.
    assert found == pytest.approx(share * 94.5 / 1000 / 4)


def test_without_a_box_nothing_is_said_of_coordinates():
    tokens = written("I see 2 dogs")
    assert departure(forced(tokens, tokens)).keys() == MEASURES.keys() - {"kl_coordinates", "box_shift"}
    assert departure(forced((), ())) == {}
    with pytest.raises(ValueError, match="reference=none"):
        departure(said(tokens))


def test_reasoning_without_an_end_has_no_answer_s_probability():
    tokens = written("<think>a")
    assert "answer_probability_change" not in departure(forced(tokens, tokens, 0.1))


def test_a_forced_answer_comes_back_from_its_trailer():
    reference, model = written(TEXT, p1={"1": 0.75, "2": 0.25}), written(TEXT, -0.5, p1={"1": 0.25, "2": 0.5})
    kl = tuple(float(f"{1.23456789e-7 * k:.6g}") for k in range(len(reference)))
    response = forced(reference, tuple(t._replace(logprob=round(t.logprob, 6)) for t in model), kl)
    again = Response.decode(response.encode())
    assert again.forced.divergences == kl
    assert again.of_reference[1].tokens[1].alternatives == model[1].alternatives
    assert [token.logprob for token in again.forced.model] == [token.logprob for token in response.forced.model]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (('"kl":[0.5', '"kl":[-0.5'), "divergences of at least 0"),
        (('"agreed":[1', '"agreed":[2'), "marks of 0 or 1"),
        (('"agreed":[1,', '"agreed":['), "for each of"),
    ],
)
def test_a_damaged_forced_answer_is_told(changed, told):
    tokens = written("ab")
    line = forced(tokens, tokens, 0.5).encode()
    assert changed[0] in line
    with pytest.raises(ValueError, match=told):
        Response.decode(line.replace(*changed))


def whole(rng, digits):
    """Distribution over ten digits and other tokens, as a model has it, and what its log keeps."""
    p = rng.dirichlet(np.full(14, 0.4))
    listed = {str(k): round(float(p[k]), 5) for k in range(10) if p[k] >= 5e-5}
    unlisted = round(float(sum(p[k] for k in range(10) if p[k] < 5e-5)), 5)
    return p, Token(digits, round(math.log(p[int(digits)]), 6), Alternatives(listed, unlisted))


def test_bounds_from_logs_bracket_the_exact_divergence_at_digits():
    rng = np.random.default_rng(0)
    apart = []
    for _ in range(200):
        (p, first), (q, second) = whole(rng, "3"), whole(rng, "3")
        found = kept_departure(said((first,)), said((second,)), (((0, 1),), ((0, 1),)))
        exact = float(entropy(p, q))
        low, high = found.measures["kl_coordinates"]
        assert low <= exact <= high
        assert found.measures["kl"] == found.measures["kl_coordinates"]
        apart.append((exact - low) / exact)
    # Digits tell most of it.
    assert np.median(apart) < 0.5


def test_tokens_count_up_to_the_first_other_one_and_digits_there_too():
    one, other = written("[1, 5]", -0.1), written("[1, 7]", -0.1)
    digits = {"5": 0.6, "7": 0.4}, {"5": 0.3, "7": 0.7}
    one, other = (
        (
            *tokens[:4],
            tokens[4]._replace(logprob=math.log(told[tokens[4].text]), alternatives=Alternatives(told)),
            *tokens[5:],
        )
        for tokens, told in zip((one, other), digits, strict=True)
    )
    found = kept_departure(said(one), said(other))
    assert (found.compared, found.tokens) == (5, 7)
    assert found.measures["token_agreement"].low == pytest.approx(4 / 5)
    assert found.measures["answer_agreement"] == (0.0, 0.0)
    kl = 0.6 * math.log(2) + 0.4 * math.log(4 / 7)
    assert found.measures["kl"].low == pytest.approx(kl / 5, abs=1e-4)
    words = kept_departure(said(written("yes")), said(written("no")))
    assert (words.compared, words.measures["token_agreement"].low) == (0, 0.0)
    assert "kl" not in words.measures


def test_a_box_shift_from_logs_is_that_of_forced_digits_where_answers_are_equal():
    one, other = written(TEXT), written(TEXT, p2={"0": 0.5, "9": 0.5})
    kept = kept_departure(said(one), said(other), (spans(), spans()), READ).measures["box_shift"]
    assert kept.low == kept.high == pytest.approx(departure(forced(one, other), spans(), READ)["box_shift"])


def test_answers_without_probabilities_tell_nothing():
    assert kept_departure(Response("a"), said(written("a"))).measures == {}
