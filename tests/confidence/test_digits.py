"""Expected IoU under a model's own digits: by hand, by brute force, and what certainty and nonsense give."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.confidence.digits import AnsweredBox, NumberDistribution, expected_iou, ious, numbers_of
from lmms_plugin.protocol.boxes import Box, iou
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.response import Alternatives, Token

SIZES = {"original_size": (640, 480), "model_size": (644, 476)}
READ = partial(DIALECTS["qwen3_vl"].boxes, **SIZES)


def certain(value):
    return NumberDistribution(value, np.array([value]), np.array([1.0]))


def written(text, **uncertain):
    """One token per character, certain but for those at the given positions (`p3={"5": 0.5}`)."""
    tokens = []
    for position, character in enumerate(text):
        chosen = uncertain.get(f"p{position}", {character: 1.0})
        tokens.append(
            Token(character, math.log(chosen[character]), Alternatives(chosen))
            if character.isdecimal()
            else Token(character, 0.0)
        )
    return tokens


def spans(text, dialect="qwen3_vl"):
    return DIALECTS[dialect].parse(text, **SIZES).coordinates


def test_two_edges_at_one_digit():
    # Right edge 400 or 800, as likely: IoU 1 or 1/2.
    numbers = (
        certain(0.0),
        certain(0.0),
        NumberDistribution(400.0, np.array([400.0, 800.0]), np.array([0.5, 0.5])),
        certain(1000.0),
    )
    assert expected_iou(AnsweredBox(numbers, READ)) == pytest.approx(0.75)


def test_probability_outside_of_digits_is_no_box():
    numbers = (
        certain(0.0),
        certain(0.0),
        NumberDistribution(400.0, np.array([400.0]), np.array([0.6])),
        certain(1000.0),
    )
    assert expected_iou(AnsweredBox(numbers, READ)) == pytest.approx(0.6)


@pytest.mark.parametrize("exact", [0, 20_000], ids=["drawn", "counted"])
@given(st.tuples(*[st.integers(0, 900)] * 2), st.tuples(*[st.integers(1, 99)] * 2))
def test_a_certain_model_expects_its_own_box(exact, corner, size):
    box = [*map(float, corner), *(float(a + b) for a, b in zip(corner, size, strict=True))]
    assert expected_iou(AnsweredBox(tuple(map(certain, box)), READ), exact=exact) == pytest.approx(1.0)


def test_no_box_has_no_expectation():
    assert math.isnan(expected_iou(AnsweredBox((), READ)))
    inverted = tuple(map(certain, (500.0, 0.0, 400.0, 1000.0)))
    assert math.isnan(expected_iou(AnsweredBox(inverted, READ)))


def test_draws_agree_with_every_box_of_four_digits_counted_by_plain_loops():
    rng = np.random.default_rng(0)
    for _ in range(5):
        peaks = (1, 2, 7, 8)
        weights = [np.exp(-rng.uniform(0.2, 3) * np.abs(np.arange(10) - peak)) for peak in peaks]
        shares = [0.97 * weight / weight.sum() for weight in weights]
        numbers = tuple(
            NumberDistribution(float(100 * peak), 100.0 * np.arange(10), share)
            for peak, share in zip(peaks, shares, strict=True)
        )
        answered = Box(*(peak / 10 for peak in peaks))
        brute = sum(
            math.prod(share[digit] for share, digit in zip(shares, digits, strict=True))
            * iou(answered, Box(*(digit / 10 for digit in digits)))
            for digits in itertools.product(range(10), repeat=4)
        )
        assert expected_iou(AnsweredBox(numbers, READ)) == pytest.approx(brute, abs=1e-12)
        assert expected_iou(AnsweredBox(numbers, READ), exact=0) == pytest.approx(brute, abs=5e-3)


def test_draws_are_the_same_every_time():
    numbers = tuple(
        NumberDistribution(mean, np.arange(1000.0), np.full(1000, 1e-3)) for mean in (100.0, 200.0, 800.0, 900.0)
    )
    assert expected_iou(AnsweredBox(numbers, READ)) == expected_iou(AnsweredBox(numbers, READ))


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_many_overlaps_are_those_of_one_at_a_time(first, second):
    a, b = Box.clip(*first), Box.clip(*second)
    if a is not None:
        rows = np.array([second if b is not None else [math.nan] * 4])
        assert ious(a, rows)[0] == pytest.approx(iou(a, b) if b is not None else 0.0)


# From tokens to numbers


def test_a_digit_that_could_have_been_another():
    text = "[512, 0, 999, 7]"
    numbers = numbers_of(written(text, p1={"5": 0.5, "6": 0.3}, p3={"2": 0.9, "1": 0.1}), spans(text))
    first = numbers[0]
    found = dict(zip(first.values.tolist(), first.probabilities.tolist(), strict=True))
    # Half of the time the number begins with 5, and then ends in 2 or 1; 6 is followed by anything.
    assert found[512.0] == pytest.approx(0.45)
    assert found[511.0] == pytest.approx(0.05)
    assert [found[float(value)] for value in range(600, 700)] == pytest.approx([0.003] * 100)
    assert first.probabilities.sum() == pytest.approx(0.8)
    assert [number.answered for number in numbers] == [512.0, 0.0, 999.0, 7.0]


def test_unlisted_digits_share_what_is_left():
    tokens = [Token("3", math.log(0.7), Alternatives({"3": 0.7, "4": 0.2}, 0.08))]
    (number,) = numbers_of(tokens, [(0, 1)])
    assert dict(zip(number.values, number.probabilities, strict=True))[9.0] == pytest.approx(0.01)
    assert number.probabilities.sum() == pytest.approx(0.98)


def test_a_whole_number_in_one_token_may_have_more_digits_and_stays_in_range():
    tokens = [Token("<loc0099>", math.log(0.5), Alternatives({"0099": 0.5, "0100": 0.3}, 0.2))]
    (number,) = numbers_of(tokens, [(0, 9)], largest=1023)
    assert number.answered == 99.0
    assert number.values.max() == 1023.0
    assert dict(zip(number.values, number.probabilities, strict=True))[100.0] == pytest.approx(0.3)
    (number,) = numbers_of([Token("99", math.log(0.6), Alternatives({"99": 0.6, "100": 0.4}))], [(0, 2)])
    assert sorted(number.values) == [99.0, 100.0]


def test_part_of_a_number_must_keep_its_length():
    tokens = [
        Token("1", 0.0, Alternatives({"1": 1.0})),
        Token("23", math.log(0.6), Alternatives({"23": 0.6, "4": 0.4})),
    ]
    (number,) = numbers_of(tokens, [(0, 3)])
    assert number.values.tolist() == [123.0]
    assert number.probabilities.tolist() == pytest.approx([0.6])


def test_fractions_and_signs():
    text = "-0.57"
    (number,) = numbers_of(written(text, p3={"5": 0.5, "6": 0.5}), [(0, 5)])
    assert number.answered == pytest.approx(-0.57)
    assert sorted(number.values)[:2] == pytest.approx([-0.69, -0.68])


def test_a_sampled_token_that_is_not_listed_counts_by_its_own_probability():
    (number,) = numbers_of([Token("3", math.log(0.1), Alternatives({"7": 0.6}, 0.4))], [(0, 1)])
    found = dict(zip(number.values.tolist(), number.probabilities.tolist(), strict=True))
    assert found[3.0] == pytest.approx(0.1)
    assert found[0.0] == pytest.approx(0.3 / 8)


def test_without_a_record_there_are_no_numbers():
    assert numbers_of([Token("3", -0.1)], [(0, 1)]) is None


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_boxes_are_read_as_parse_reads_them(name):
    dialect = DIALECTS[name]
    rng = np.random.default_rng(0)
    scale = 1.06 * (644 if dialect.requires_model_size else dialect.scale)
    if dialect.fields == ("first", "last"):
        scale = 1.02 * dialect.scale**2
    texts, rows = [], []
    for numbers in rng.uniform(0, scale, (200, len(dialect.fields))):
        shown = [dialect.number.format(value) for value in numbers]
        texts.append(dialect.box.format(**dict(zip(dialect.fields, shown, strict=True))))
        around = dialect.number.split("{")[0], dialect.number.split("}")[1]
        rows.append([float(text[len(around[0]) : len(text) - len(around[1])]) for text in shown])
    boxes = dialect.boxes(np.array(rows), **SIZES)
    parsed = [dialect.parse(text, **SIZES).box for text in texts]
    assert any(box is None for box in parsed)
    assert any(box is not None for box in parsed)
    for box, row in zip(parsed, boxes, strict=True):
        assert row.tolist() == (pytest.approx(tuple(box)) if box else pytest.approx([math.nan] * 4, nan_ok=True))
