"""Confidence estimators: closed forms, what is missing, and which tokens write the box."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.confidence.agreement import Agreement
from lmms_plugin.confidence.estimators import (
    ESTIMATORS,
    NEEDS,
    TEXT_ESTIMATORS,
    Evidence,
    coordinate_mask,
    leading_mask,
    obtaining,
    place_values,
)
from lmms_plugin.confidence.estimators import estimate_all as estimate_evidence

PROBABILITIES = np.array([0.9, 0.5, 1.0, 0.8, 0.25])
MASK = np.array([False, True, False, True, False])
PLACES = np.array([0.0, 10.0, 0.0, 1.0, 0.0])
EVERY = {**ESTIMATORS, **TEXT_ESTIMATORS}

LEADING = np.array([False, True, False, False, False])
OF_TOKENS = {name: estimator for name, estimator in EVERY.items() if name not in NEEDS}


def estimate_all(logprobs, mask, places=None, estimators=ESTIMATORS):
    places = np.zeros(len(logprobs)) if places is None else places
    return estimate_evidence(Evidence(logprobs, mask, places, mask), estimators)


LOGPROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("joint", 0.9 * 0.5 * 0.8 * 0.25),
        ("mean", (0.9 * 0.5 * 0.8 * 0.25) ** (1 / 5)),
        ("min", 0.25),
        ("first", 0.9),
        ("coordinate_joint", 0.5 * 0.8),
        ("coordinate_mean", math.sqrt(0.5 * 0.8)),
        ("coordinate_min", 0.5),
        ("coordinate_first", 0.5),
        ("coordinate_place", 0.5 ** (10 / 11) * 0.8 ** (1 / 11)),
        ("coordinate_leading", 0.5),
        ("word_joint", 0.5 * 0.8),
        ("word_mean", math.sqrt(0.5 * 0.8)),
        ("word_min", 0.5),
        ("word_first", 0.5),
    ],
)
def test_closed_forms(name, expected):
    evidence = Evidence(np.log(PROBABILITIES), MASK, PLACES, LEADING)
    assert EVERY[name](evidence) == pytest.approx(expected)


def test_estimate_all_is_every_estimator_that_there_is_evidence_for():
    evidence = Evidence(np.log(PROBABILITIES), MASK, PLACES, LEADING)
    for estimators in (ESTIMATORS, TEXT_ESTIMATORS):
        expected = {name: estimate(evidence) for name, estimate in estimators.items() if name not in NEEDS}
        assert estimate_evidence(evidence, estimators) == expected
        assert all(type(value) is float for value in expected.values())
    everything = evidence._replace(agreement=Agreement((0.5,), (), 1), stated=0.25)
    assert set(estimate_evidence(everything, TEXT_ESTIMATORS)) == set(TEXT_ESTIMATORS)


def test_nothing_to_estimate_from_is_missing_not_zero():
    assert all(math.isnan(value) for value in estimate_all([], []).values())
    without_box = estimate_all(np.log([0.5, 0.5]), [False, False], estimators=EVERY)
    for name, value in without_box.items():
        assert math.isnan(value) == name.startswith(("coordinate_", "word_"))


def test_coordinates_without_digits_have_no_place_weighted_confidence():
    estimates = estimate_all(np.log([0.5, 0.5]), [True, True])
    assert math.isnan(estimates.pop("coordinate_place"))
    assert not any(map(math.isnan, estimates.values()))


def test_place_weights_of_equal_numbers_in_one_token_each_are_no_weights():
    estimates = estimate_all(np.log(PROBABILITIES), MASK, 1000.0 * MASK)
    assert estimates["coordinate_place"] == pytest.approx(estimates["coordinate_mean"])


@pytest.mark.parametrize("places", [[-1.0], [math.nan], [math.inf], [1.0, 1.0]], ids=str)
def test_bad_place_values_are_named(places):
    with pytest.raises(ValueError, match="place value"):
        ESTIMATORS["coordinate_place"](Evidence([-0.1], [True], places))


def test_impossible_token_gives_zero():
    estimates = estimate_all([-math.inf, -0.1], [True, False], [1.0, 0.0], EVERY)
    assert estimates == dict.fromkeys(OF_TOKENS, 0.0)


def test_long_answers_underflow_to_zero_without_a_warning():
    with np.errstate(all="raise", under="ignore"):
        assert ESTIMATORS["joint"](Evidence(np.full(2000, -1.0), np.ones(2000, bool))) == 0.0
    assert ESTIMATORS["mean"](Evidence(np.full(2000, -1.0), np.ones(2000, bool))) == pytest.approx(math.exp(-1))


def test_rounding_above_zero_is_certainty():
    estimates = estimate_all(np.float32([1e-7, 0.0]), [True, True], [1.0, 1.0])
    assert estimates == dict.fromkeys(ESTIMATORS.keys() - NEEDS.keys(), 1.0)


def test_structural_tokens_dilute_all_but_the_coordinate_family():
    plain = estimate_all(np.log([0.5, 0.8]), [True, True])
    padded = estimate_all(np.log([1.0, 0.5, 1.0, 0.8, 1.0]), [False, True, False, True, False])
    assert padded["mean"] > plain["mean"]
    for name in ("coordinate_joint", "coordinate_mean", "coordinate_min", "joint", "min"):
        assert padded[name] == pytest.approx(plain[name])


@given(LOGPROBS, st.randoms())
def test_estimators_are_ordered_fractions(logprobs, random):
    mask = [random.random() < 0.5 for _ in logprobs]
    mask[0] = True
    values = estimate_all(logprobs, mask, [random.choice([0.0, 1.0, 10.0, 100.0]) for _ in mask])
    place = values["coordinate_place"]
    assert math.isnan(place) or values["coordinate_min"] <= place * (1 + 1e-9) <= 1 + 1e-9
    slack = 1 + 1e-9
    for prefix in ("", "coordinate_"):
        assert 0 <= values[prefix + "joint"] <= values[prefix + "min"] * slack
        assert values[prefix + "min"] <= values[prefix + "mean"] * slack <= slack**2
    assert values["joint"] <= values["coordinate_joint"] * slack
    assert values["min"] <= values["coordinate_min"] * slack


@pytest.mark.parametrize(
    ("logprobs", "mask", "message"),
    [
        ([math.nan], [True], "nan at index 0"),
        ([-0.1, 0.5], [True, True], "0.5 at index 1"),
        ([-0.1], [True, False], r"shapes \(1,\) and \(2,\)"),
        ([[-0.1]], [[True]], r"shapes \(1, 1\)"),
        ([-0.1], [1], "boolean"),
    ],
    ids=["nan", "positive", "lengths", "2-D", "integer mask"],
)
@pytest.mark.parametrize("name", list(OF_TOKENS))
def test_bad_input_is_named(name, logprobs, mask, message):
    with pytest.raises(ValueError, match=message):
        EVERY[name](Evidence(logprobs, mask, [1.0], [True]))


# Other evidence


def test_agreement_is_the_mean_over_samples_and_over_their_pairs():
    evidence = Evidence([], [], agreement=Agreement((1.0, 0.5, 0.0), (0.5, 0.0, 0.0), 2))
    assert EVERY["agreement"](evidence) == pytest.approx(0.5)
    assert EVERY["agreement_pairwise"](evidence) == pytest.approx(1 / 6)


def test_without_an_answer_or_a_pair_there_is_no_agreement():
    assert math.isnan(EVERY["agreement"](Evidence([], [], agreement=Agreement((), (0.5,), 2))))
    assert math.isnan(EVERY["agreement_pairwise"](Evidence([], [], agreement=Agreement((0.5,), (), 1))))


@pytest.mark.parametrize("name", [*NEEDS, "selector"])
def test_what_was_not_gathered_is_said_how_to_obtain(name):
    assert name not in estimate_all([-0.1], [True])
    assert obtaining(name).startswith(" (")


def test_for_an_unknown_estimator_there_is_no_way():
    assert obtaining("guess") == ""


# Which tokens write the box


@pytest.mark.parametrize(
    ("tokens", "spans", "expected"),
    [
        (["[", "12", ",", "34", "]", ""], [(1, 3), (4, 6)], [0, 1, 0, 1, 0, 0]),
        (["[1", "2,", "3", "4]"], [(1, 3), (4, 6)], [1, 1, 1, 1]),
        (["ab", "cd", "ef"], [(2, 4)], [0, 1, 0]),
        (["ab", "cd", "ef"], [(1, 3)], [1, 1, 0]),
        (["abcdef"], [(2, 3), (4, 5)], [1]),
        (["a", "", "b"], [(0, 2)], [1, 0, 1]),
        (["a", "b"], [(1, 1)], [0, 0]),
        (["a", "b"], [], [0, 0]),
        ([], [], []),
        (["<loc_12>", "<loc_34>", "a dog"], [(0, 8), (8, 16)], [1, 1, 0]),
        (["é", "1", "猫"], [(1, 2)], [0, 1, 0]),
    ],
    ids=[
        "one per number", "straddling", "exact", "half open", "one token", "empty token", "empty span", "no box",
        "no tokens", "location tokens", "characters not bytes",
    ],
)  # fmt: skip
def test_coordinate_mask(tokens, spans, expected):
    mask = coordinate_mask(tokens, spans)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [bool(value) for value in expected]


@given(st.lists(st.text("ab1 ", max_size=4), max_size=12), st.data())
def test_coordinate_mask_is_character_overlap(tokens, data):
    total = sum(map(len, tokens))
    edge = st.integers(0, total)
    spans = [tuple(sorted(pair)) for pair in data.draw(st.lists(st.tuples(edge, edge), max_size=4))]
    covered = {i for start, end in spans for i in range(start, end)}
    owners = [index for index, token in enumerate(tokens) for _ in token]
    expected = {owners[i] for i in covered}
    assert set(np.flatnonzero(coordinate_mask(tokens, spans)).tolist()) == expected


@pytest.mark.parametrize("span", [(0, 4), (-1, 2), (2, 1), (4, 4)], ids=str)
def test_spans_outside_the_text(span):
    with pytest.raises(ValueError, match="spans inside the 3 characters"):
        coordinate_mask(["ab", "c"], [span])


# How much a token's digits move the box


@pytest.mark.parametrize(
    ("tokens", "spans", "expected"),
    [
        (list("[123,45]"), [(1, 4), (5, 7)], [0, 100, 10, 1, 0, 10, 1, 0]),
        (["[", "123", ",", "7", "]", ""], [(1, 4), (5, 6)], [0, 100, 0, 1, 0, 0]),
        (list("0.57"), [(0, 4)], [1, 0, 0.1, 0.01]),
        (list("-05.5"), [(0, 5)], [0, 10, 1, 0, 0.1]),
        (["<loc0123>", "<loc1000>"], [(0, 9), (9, 18)], [1000, 1000]),
        (["[1", "2,3", "4]"], [(1, 3), (4, 6)], [10, 10, 1]),
        (["box 12"], [], [0]),
        ([], [], []),
    ],
    ids=["digits", "numbers", "fraction", "sign", "location tokens", "straddling", "no span", "no tokens"],
)
def test_place_values(tokens, spans, expected):
    assert place_values(tokens, spans).tolist() == pytest.approx(expected)


def test_place_values_outside_the_text():
    with pytest.raises(ValueError, match="spans inside the 1 characters"):
        place_values(["1"], [(0, 2)])


@pytest.mark.parametrize(
    ("tokens", "spans", "expected"),
    [
        (list("[12,34]"), [(1, 3), (4, 6)], [0, 1, 0, 0, 1, 0, 0]),
        (list("-05.5"), [(0, 5)], [0, 1, 0, 0, 0]),
        (["<loc0123>", "<loc1000>"], [(0, 9), (9, 18)], [1, 1]),
        (["[1", "2,3", "4]"], [(1, 3), (4, 6)], [1, 1, 0]),
        (["box"], [(0, 3)], [0]),
        ([], [], []),
    ],
    ids=["digits", "sign", "location tokens", "straddling", "no digit", "no tokens"],
)
def test_leading_mask(tokens, spans, expected):
    assert leading_mask(tokens, spans).tolist() == [bool(value) for value in expected]
