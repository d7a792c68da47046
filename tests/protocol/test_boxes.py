"""Boxes: closed forms, bad input, and agreement with torchvision."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from lmms_plugin.protocol.boxes import OVERSHOOT, Box, iou

FULL = Box(0, 0, 1, 1)
unit = st.floats(0, 1)
any_box = st.builds(Box, unit, unit, unit, unit)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(FULL, FULL, 1, id="same"),
        pytest.param(FULL, Box(0, 0, 0.5, 0.5), 1 / 4, id="inside"),
        pytest.param(Box(0, 0, 0.5, 0.5), Box(0.25, 0, 0.75, 0.5), 1 / 3, id="half shifted"),
        pytest.param(Box(0, 0, 0.5, 0.5), Box(0.25, 0.25, 0.75, 0.75), 1 / 7, id="corner"),
        pytest.param(Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1), 0, id="touching"),
        pytest.param(Box(0, 0, 0.2, 0.2), Box(0.5, 0.5, 1, 1), 0, id="apart"),
        pytest.param(Box(0.5, 0, 0.5, 1), FULL, 0, id="no width"),
        pytest.param(Box(0.3, 0.3, 0.3, 0.3), Box(0.3, 0.3, 0.3, 0.3), 0, id="two equal points"),
        pytest.param(Box(0.8, 0.2, 0.2, 0.8), FULL, 0, id="inverted"),
        pytest.param(Box(0, 0, 1e-200, 1e-200), Box(0, 0, 1e-200, 1e-200), 0, id="area underflows"),
    ],
)
def test_iou_closed_form(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == iou(a, b)


@given(any_box, any_box)
def test_iou_is_a_symmetric_fraction(a, b):
    assert 0 <= iou(a, b) <= 1
    assert iou(a, b) == iou(b, a)


def corners_of(side):
    return [(a, b) for a in range(side) for b in range(a + 1, side + 1)]


def as_fractions(box, size):
    x1, y1, x2, y2 = box
    return Box(x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1])


def taken_apart(box, size):
    """A box that was written as corner and sides in pixels and read again, as when a log is scored anew."""
    width, height = size
    x, y, w, h = box.x1 * width, box.y1 * height, (box.x2 - box.x1) * width, (box.y2 - box.y1) * height
    return Box(x / width, y / height, (x + w) / width, (y + h) / height)


def exact_iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return Fraction(width * height, sum(areas) - width * height)


THRESHOLDS = (Fraction(1, 2), Fraction(3, 4), Fraction(9, 10))


@pytest.mark.parametrize("size", [(6, 4), (10, 2), (7, 3)], ids=str)
def test_every_pair_of_pixel_boxes_is_decided_as_in_whole_numbers(size):
    boxes = [(x1, y1, x2, y2) for x1, x2 in corners_of(size[0]) for y1, y2 in corners_of(size[1])]
    ties = 0
    for a in boxes:
        for b in boxes:
            exact = exact_iou(a, b)
            found = iou(as_fractions(a, size), as_fractions(b, size))
            assert found == pytest.approx(float(exact), abs=1e-12)
            for threshold in THRESHOLDS:
                assert (found >= float(threshold)) == (exact >= threshold), (a, b, size)
            ties += exact in THRESHOLDS
    assert ties > 100


@pytest.mark.parametrize(
    "size", [(640, 480), (333, 500), (1000, 667), (1920, 1079), (7680, 4321), (65535, 1361)], ids=str
)
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=str)
def test_ties_and_their_nearest_neighbours_in_images_of_every_size(size, threshold):
    """A box and the same without a tenth, a quarter or a half of its width, everywhere; and a pixel more or less."""
    rng = random.Random(str((size, threshold)))
    for _ in range(3000):
        whole = threshold.denominator * rng.randint(1, size[0] // threshold.denominator)
        x, y1 = rng.randint(0, size[0] - whole), rng.randint(0, size[1] - 1)
        y2 = rng.randint(y1 + 1, size[1])
        part = whole * threshold.numerator // threshold.denominator
        a = (x, y1, x + whole, y2)
        for more in (-1, 0, 1):
            b = (x, y1, x + part + more, y2)
            if not x < b[2] <= a[2]:
                continue
            expected = exact_iou(a, b) >= threshold
            one, other = as_fractions(a, size), as_fractions(b, size)
            for found in (iou(one, other), iou(other, one), iou(taken_apart(one, size), other)):
                assert (found >= float(threshold)) == expected, (a, b, size)


@pytest.mark.parametrize("side", [3, 101, 9461, 30001])
def test_one_pixel_too_few_is_no_tie(side):
    """Of an odd square, (side² - 1) / 2 pixels: no pixel boxes come closer to one half. 9461² is Pillow's limit."""
    size, whole, part = (side, side), (0, 0, side, side), (0, 0, side - 1, (side + 1) // 2)
    assert exact_iou(whole, part) == Fraction(1, 2) - Fraction(1, 2 * side**2)
    assert iou(as_fractions(whole, size), as_fractions(part, size)) < 0.5


def test_iou_agrees_with_torchvision():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, 2, generator=generator, dtype=torch.float64).sort(dim=1).values.flatten(1)
    ours = [[iou(Box(*a), Box(*b)) for b in corners[100:].tolist()] for a in corners[:100].tolist()]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), box_iou(corners[:100], corners[100:]))


def test_pixels_become_fractions():
    assert Box.from_xywh((64, 48, 128, 240), (640, 480)) == (0.1, 0.1, 0.3, 0.6)
    assert Box.from_xyxy((64, 48, 192, 288), (640, 480)) == (0.1, 0.1, 0.3, 0.6)


def test_annotations_overshoot_an_edge_by_rounding():
    assert Box.from_xywh((600.5, -0.3, 40.2, 480.9), (640, 480)) == (600.5 / 640, 0, 1, 1)


@pytest.mark.parametrize(
    ("xyxy", "size", "message"),
    [
        pytest.param((1, 2, 3), (640, 480), "Expected 4 numbers", id="three numbers"),
        pytest.param((0, 0, 1, 1), (0, 480), "positive width and height", id="empty image"),
        pytest.param((10, 10, 10, 20), (640, 480), "with area", id="no width"),
        pytest.param((30, 10, 20, 20), (640, 480), "with area", id="inverted"),
        pytest.param((math.nan, 0, 20, 20), (640, 480), "with area", id="nan"),
        pytest.param((0, 0, math.inf, 20), (640, 480), "inside the 640x480", id="infinite"),
        pytest.param((700, 10, 720, 20), (640, 480), "with area inside", id="outside"),
        pytest.param((0, 0, 640 * (1 + OVERSHOOT) + 1, 480), (640, 480), "inside the 640x480", id="far over the edge"),
    ],
)
def test_what_is_no_box_is_an_error(xyxy, size, message):
    with pytest.raises(ValueError, match=message):
        Box.from_xyxy(xyxy, size)


def test_corners_read_as_width_and_height_are_an_error():
    with pytest.raises(ValueError, match="inside the 640x480"):
        Box.from_xywh((300, 200, 500, 400), (640, 480))
    with pytest.raises(ValueError, match="x, y, width, height"):
        Box.from_xywh((1, 2, 3, 4, 5), (640, 480))


@given(*[st.floats(allow_nan=True, allow_infinity=True)] * 4)
def test_clip_gives_an_ordered_box_inside_the_image_or_none(x1, y1, x2, y2):
    box = Box.clip(x1, y1, x2, y2)
    if box is not None:
        assert 0 <= box.x1 < box.x2 <= 1
        assert 0 <= box.y1 < box.y2 <= 1
