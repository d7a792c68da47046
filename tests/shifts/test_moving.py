import importlib.util
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from helpers import imagecorruptions_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmms_plugin.demo import scenes
from lmms_plugin.shifts.benchmark import FIFTEEN
from lmms_plugin.shifts.image import moving
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.shifts.image.motion import shuffle_sources
from lmms_plugin.shifts.image.movements import LONGEST, CanvasSize, Displacement, area, warped
from lmms_plugin.shifts.image.moving import MOVING, apply, glass_drift, movement
from lmms_plugin.shifts.language.directions import RULES
from lmms_plugin.shifts.severities import SEVERITIES

GEOMETRY = tuple(name for name, shift in MOVING.items() if shift.kind == "geometry")
CORRUPTIONS = tuple(name for name, shift in MOVING.items() if shift.kind == "corruption")
every_severity = pytest.mark.parametrize("severity", SEVERITIES)
every_shift = pytest.mark.parametrize("name", MOVING)
SIZE = CanvasSize(320, 240)
BOXES = {
    "large": (90, 70, 230, 170),
    "small": (140, 100, 172, 132),
    "at the left": (0, 60, 150, 160),
    "in the corner": (150, 120, 320, 240),
}


@pytest.fixture(scope="module")
def reference():
    if importlib.util.find_spec("imagecorruptions") is None:
        pytest.skip("imagecorruptions, the reference, is not installed (extra `dev`)")
    return imagecorruptions_reference.load()


def scene(box, size=SIZE):
    """A white rectangle on black."""
    pixels = np.zeros((size.height, size.width, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def extent(image):
    """The bounding box of what is nearer to white than to black; grey, beside the picture, is not."""
    white = image[..., 0] >= 128
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def mean_edges(image, box, rim=0.4):
    """The mean place of each blurred edge: an edge lies as far from the middle as there is white on the way to it.

    Without the share `rim` of the box at either end of an edge, where the copies of a blur do not overlap.
    """
    white, (x0, y0, x1, y1) = image[..., 0] / 255, box
    x, y = round((x0 + x1) / 2), round((y0 + y1) / 2)
    rows = white[round(y0 + rim * (y1 - y0)) : round(y1 - rim * (y1 - y0))].mean(axis=0)
    columns = white[:, round(x0 + rim * (x1 - x0)) : round(x1 - rim * (x1 - x0))].mean(axis=1)
    return x - rows[:x].sum(), y - columns[:y].sum(), x + rows[x:].sum(), y + columns[y:].sum()


@every_severity
@every_shift
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_a_rectangle_is_found_again_where_its_box_was_moved_to(name, severity, box):
    for key in range(2):
        moved = movement(SIZE, name, severity, key)
        image = moved.render(scene(box))
        assert image.shape == (moved.size.height, moved.size.width, 3)
        expected = moved.box(box)
        if moved.visible(box) < 0.02:  # a crop past the small box
            continue
        if MOVING[name].kind == "geometry" or isinstance(moved, Displacement):
            found = extent(image)
        elif box == BOXES["small"]:
            continue  # smeared further than it is wide, it has no row that all copies share
        else:
            found = mean_edges(image, expected, rim=0.1 if name == "glass_blur" else 0.4)
        assert np.abs(np.subtract(found, expected)).max() <= 1, (key, found, expected)


def test_the_finders_see_a_displacement():
    image = np.roll(scene(BOXES["large"]), (2, 5), axis=(0, 1))
    assert extent(image) == (95, 72, 235, 172)
    assert mean_edges(image, BOXES["large"]) == pytest.approx((95, 72, 235, 172))


def test_five_severities_of_each_and_the_fifteen_of_the_benchmark():
    assert set(GEOMETRY) == {
        *("crop", "pad", "horizontal_flip", "quarter_turn", "rotation"),
        *("aspect_ratio", "downscale", "upscale", "shear", "perspective"),
    }
    assert all(len(shift.levels) == 5 and shift.words in RULES for shift in MOVING.values())
    assert not SHIFTS.keys() & MOVING.keys()
    assert len(set(FIFTEEN)) == 15
    assert set(FIFTEEN) <= SHIFTS.keys() | set(CORRUPTIONS)
    assert set(CORRUPTIONS) <= set(FIFTEEN)
    with pytest.raises(ValueError, match="expected 5 levels, got 2"):
        moving.moving_shift((1,), (2,))


def photo(side=160):
    return Image.fromarray(skimage.data.astronaut()).resize((side, side * 3 // 4), Image.Resampling.BOX)


@pytest.mark.parametrize(
    ("name", "nothing"),
    [
        ("crop", (1,)),
        ("pad", (0,)),
        ("rotation", (0,)),
        ("aspect_ratio", (1,)),
        ("downscale", (1,)),
        ("upscale", (1,)),
        ("shear", (0,)),
        ("perspective", (0,)),
        ("motion_blur", (0, 1)),
        ("zoom_blur", (1.001, 0.01)),
        ("elastic_transform", (0,)),
    ],
)
def test_no_strength_changes_nothing(name, nothing):
    pixels = np.asarray(photo())
    moved = MOVING[name].function(CanvasSize(160, 120), np.random.default_rng(0), *nothing)
    assert np.array_equal(moved.render(pixels), pixels)
    assert moved.box((10, 20, 50, 60)) == pytest.approx((10, 20, 50, 60))
    assert moved.visible((10, 20, 50, 60)) == pytest.approx(1)


def test_mirrors_turns_and_cuts_are_exact():
    pixels = np.asarray(photo())
    assert np.array_equal(apply(photo(), "horizontal_flip", 1, 0), pixels[:, ::-1])
    turns = {np.asarray(apply(photo(), "quarter_turn", 3, key)).tobytes() for key in range(8)}
    assert turns == {np.rot90(pixels, k).tobytes() for k in (1, 3)}
    cut = movement((160, 120), "crop", 4, 0)
    left, top = -cut.matrix[0, 2], -cut.matrix[1, 2]
    assert cut.size == (112, 84)
    assert np.array_equal(cut.render(pixels), pixels[int(top) : int(top) + 84, int(left) : int(left) + 112])
    padded = movement((160, 120), "pad", 5, 0)
    assert padded.size == (320, 240)
    x, y = (int(padded.matrix[axis, 2]) for axis in (0, 1))
    assert np.array_equal(padded.render(pixels)[y : y + 120, x : x + 160], pixels)


@every_shift
def test_key_and_severity_choose_the_draws_and_nothing_else_does(name):
    first = np.asarray(apply(photo(), name, 2, "a"))
    movement.cache_clear()
    assert np.array_equal(first, apply(photo(), name, 2, "a"))
    others = [np.asarray(apply(photo(), name, 2, key)) for key in range(6)]
    drawn = any(image.shape != first.shape or not np.array_equal(image, first) for image in others)
    assert drawn == (name not in ("horizontal_flip", "downscale", "upscale", "zoom_blur"))


def test_a_crop_is_the_same_whatever_the_target_and_says_what_it_leaves():
    cut = movement((100, 100), "crop", 5, "photo")
    left, top = -cut.matrix[0, 2], -cut.matrix[1, 2]
    assert cut.visible((left - 10, top, left + 10, top + 20)) == pytest.approx(0.5)
    assert cut.box((left - 10, top, left + 10, top + 20)) == pytest.approx((0, 0, 10, 20))
    assert cut.visible((left, top, left + 60, top + 60)) == pytest.approx(1)
    outside = (left - 10, top, left, top + 20)
    assert cut.visible(outside) == 0 == area(cut.box(outside))


def test_crops_lie_anywhere():
    lefts = [-movement((100, 100), "crop", 5, key).matrix[0, 2] for key in range(200)]
    assert min(lefts) == 0
    assert max(lefts) == 40
    assert np.mean(lefts) == pytest.approx(20, abs=3)


@pytest.mark.parametrize("name", ["rotation", "quarter_turn", "shear", "pad", "perspective", "aspect_ratio"])
@every_severity
def test_nothing_leaves_these_canvases(name, severity):
    moved = movement(SIZE, name, severity, 0)
    assert moved.visible((0, 0, *SIZE)) == pytest.approx(1, abs=1e-3)


@every_severity
def test_the_box_of_a_turned_disc_is_as_loose_as_stated(severity):
    (degrees,) = MOVING["rotation"].levels[severity - 1]
    moved = movement((401, 401), "rotation", severity, 0)
    disc = np.zeros((401, 401, 3), np.uint8)
    cv2.circle(disc, (200, 200), 150, (255, 255, 255), -1)
    tight, loose = area(extent(moved.render(disc))), area(moved.box((50, 50, 351, 351)))
    assert tight / loose == pytest.approx(1 / (1 + math.sin(2 * math.radians(degrees))), abs=0.01)
    assert tight / loose > 0.66


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (area(a) + area(b) - shared)


@pytest.mark.parametrize("name", ["rotation", "shear", "perspective", "elastic_transform"])
def test_true_boxes_are_as_loose_around_the_demos_shapes_as_documented(name):
    page = (Path(__file__).parents[2] / "docs" / "moving_shifts.md").read_text(encoding="utf-8")
    said = re.search(rf"`{name}`\s(0\.\d\d) / (0\.\d\d) / (0\.\d\d)", page).groups()
    for severity, stated in zip((1, 3, 5), said, strict=True):
        found = []
        for k in range(25):
            drawn, moved = scenes.scene("test", k, max_objects=3), movement((112, 112), name, severity, k)
            for index, thing in enumerate(drawn.objects):
                x, y, width, height = thing.box
                silhouette = np.repeat(np.uint8(255 * (drawn.owner == index))[..., None], 3, axis=2)
                found.append(overlap(extent(moved.render(silhouette)), moved.box((x, y, x + width, y + height))))
        assert np.mean(found) == pytest.approx(float(stated), abs=0.012)


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
def test_glass_drifts_by_as_much_as_the_walk_says(reach):
    height, width = 300, 400
    dy, dx = np.random.default_rng(reach).integers(-reach, reach, (2, height, width))
    source = shuffle_sources(dy * width + dx, reach).reshape(height, width)
    inner = np.s_[40:-40, 40:-40]
    across = (source % width - np.arange(width))[inner].mean()
    down = (source // width - np.arange(height)[:, None])[inner].mean()
    assert (-across, -down) == pytest.approx((glass_drift(reach),) * 2, abs=0.05)


def test_what_lies_in_the_rim_that_glass_leaves_alone_stays():
    assert movement(SIZE, "glass_blur", 5, 0).box((319, 0, 320, 5)) == (319, 0, 320, 5)


# Agreement with imagecorruptions


@every_severity
@pytest.mark.parametrize("name", ["zoom_blur", "elastic_transform", "motion_blur"])
@pytest.mark.parametrize("picture", ["astronaut", "coffee"])
def test_equals_imagecorruptions_for_the_same_draws(reference, name, picture, severity):
    image = Image.fromarray(getattr(skimage.data, picture)()).resize((200, 150))
    theirs = imagecorruptions_reference.corrupt(reference, image, name, severity, seed=3).astype(int)
    rng = np.random.RandomState(3)
    moved = MOVING[name].function(CanvasSize(200, 150), rng, *MOVING[name].levels[severity - 1])
    difference = np.abs(moved.render(np.asarray(image)).astype(int) - theirs)
    # OpenCV's warps take places to 1/32 of a pixel; both truncate to whole levels.
    assert difference.mean() < 0.5
    assert np.quantile(difference, 0.999) <= 3


@every_severity
def test_glass_blur_agrees_with_imagecorruptions_in_distribution(reference, severity):
    clean = photo(64)  # the reference loops over pixels in Python
    theirs = [imagecorruptions_reference.corrupt(reference, clean, "glass_blur", severity, seed) for seed in range(3)]
    ours = [np.asarray(apply(clean, "glass_blur", severity, key)) for key in range(12)]
    strength = [
        np.mean([np.abs(x.astype(float) - np.asarray(clean)).mean() for x in images]) for images in (ours, theirs)
    ]
    assert strength[0] == pytest.approx(strength[1], rel=0.05)
    assert np.mean([x.std() for x in ours]) == pytest.approx(np.mean([x.std() for x in theirs]), abs=1.0)


# Input


@every_shift
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (17, 23)], ids=str)
def test_any_size_is_moved(name, size):
    for severity in (1, 5):
        moved = movement(size, name, severity, 0)
        image = moved.render(np.full((size[1], size[0], 3), 200, np.uint8))
        assert image.shape == (moved.size.height, moved.size.width, 3)
        assert area(moved.box((0, 0, *size))) > 0


@st.composite
def drawn(draw):
    """A picture's size and a box of whole pixels in it."""
    size = CanvasSize(draw(st.integers(1, 160)), draw(st.integers(1, 160)))
    ends = [sorted(draw(st.lists(st.integers(0, side), min_size=2, max_size=2, unique=True))) for side in size]
    return size, (ends[0][0], ends[1][0], ends[0][1], ends[1][1])


@given(drawn(), st.sampled_from(GEOMETRY), st.sampled_from(SEVERITIES), st.integers(0, 99))
@settings(max_examples=400, deadline=None)
def test_any_rectangle_of_any_picture_is_found_again(shown, name, severity, key):
    size, box = shown
    moved = movement(size, name, severity, key)
    expected, visible = moved.box(box), moved.visible(box)
    left, top, right, bottom = expected
    assert 0 <= left <= right <= moved.size.width
    assert 0 <= top <= bottom <= moved.size.height
    assert -1e-9 <= visible <= 1 + 1e-9
    # Thinner than two pixels, or with less in the picture, it mixes with what is beside it.
    if min(right - left, bottom - top) >= 2 and visible > 0.02:
        assert np.abs(np.subtract(extent(moved.render(scene(box, size))), expected)).max() <= 1.5


@pytest.mark.parametrize(
    ("offset", "box", "expected"),
    [(-2, (0, 0, 4, 9), (0, 0, 6, 9)), (-2, (0, 0, 1, 9), (1, 0, 3, 9)), (3, (16, 0, 20, 9), (13, 0, 20, 9))],
)
def test_the_edges_of_a_field_mirror_what_lies_behind_them(offset, box, expected):
    size, shifted = CanvasSize(20, 9), np.full((9, 20), offset, np.float32)
    columns, rows = np.meshgrid(np.arange(20, dtype=np.float32), np.arange(9, dtype=np.float32))

    def render(image):
        return cv2.remap(image, columns + shifted, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)

    moved = Displacement(size, size, render, shifted, np.zeros_like(shifted))
    assert moved.box(box) == expected == extent(moved.render(scene(box, size)))


@given(drawn(), st.sampled_from(list(MOVING)), st.sampled_from(SEVERITIES), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_box_without_width_or_height_stays_in_the_picture(shown, name, severity, lies):
    size, (left, top, right, bottom) = shown
    flat = (left, top, right, top) if lies else (left, top, left, bottom)
    moved = movement(size, name, severity, 0)
    x0, y0, x1, y1 = moved.box(flat)
    assert 0 <= x0 <= x1 <= moved.size.width
    assert 0 <= y0 <= y1 <= moved.size.height
    assert 0 <= moved.visible(flat) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("size", "name", "severity", "message"),
    [
        ((8, 8), "crops", 1, r"unknown moving shift 'crops'.*crop"),
        ((8, 8), "crop", 6, r"severity of crop: expected an integer from 1 to 5, got 6"),
        ((0, 8), "crop", 1, r"crop: expected sides of 1 to 32766 pixels, got 0x8"),
        ((LONGEST, 2), "upscale", 1, r"upscale: expected sides of at most 32766 pixels after it, got 40958x2"),
    ],
)
def test_bad_arguments_are_named(size, name, severity, message):
    with pytest.raises(ValueError, match=r"(?i)" + message):
        movement(size, name, severity, 0)


def test_a_perspective_box_is_that_of_its_corners():
    matrix = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.001, 0.0, 1.0]])
    moved = warped(SIZE, matrix, SIZE)
    assert moved.box((100, 100, 200, 200)) == pytest.approx((100 / 1.1, 100 / 1.2, 200 / 1.2, 200 / 1.1))


def test_a_field_moves_a_thing_thinner_than_a_pixel_to_one_pixel():
    shifted = np.full((20, 20), 4.0, np.float32)
    moved = Displacement(CanvasSize(20, 20), CanvasSize(20, 20), lambda image: image, shifted, np.zeros_like(shifted))
    assert moved.box((10, 5, 12, 9)) == (6, 5, 8, 9)
    assert area(moved.box((10.6, 5.6, 10.7, 5.7))) == 1
