"""Parts of a dataset's images: they partition it in an order that depends on seed and ids alone."""

import random

import pytest

from lmms_plugin.utils.image_slices import ImageSlice, asked, stages

IMAGES = [f"image{number}" for number in range(100)]


def test_slices_partition_the_images_whatever_the_order_of_rows():
    ends = stages(len(IMAGES), 7)
    parts = [ImageSlice(3, start, stop) for start, stop in zip((0, *ends), ends, strict=False)]
    shuffled = random.Random(0).sample(IMAGES * 3, 300)
    found = [part.of(shuffled) for part in parts]
    assert found == [part.of(IMAGES) for part in parts]
    assert [len(one) for one in found] == [part.stop - part.start for part in parts]
    assert sorted(image for one in found for image in one) == sorted(IMAGES)


def test_seeds_give_other_orders_that_favour_no_place():
    firsts = [ImageSlice(seed, 0, 10).of(IMAGES) for seed in range(400)]
    assert len(set(firsts)) == 400
    for image in IMAGES[:5]:
        # Binomial with n 400, p 0.1: 6 is its standard deviation.
        assert abs(sum(image in first for first in firsts) - 40) < 24


@pytest.mark.parametrize(
    ("images", "first", "expected"),
    [(100, 30, (30, 60, 100)), (30, 30, (30,)), (5, 30, (5,)), (12, 1, (1, 2, 4, 8, 12)), (60, 30, (30, 60))],
)
def test_stages_double_until_all_images(images, first, expected):
    assert stages(images, first) == expected


@pytest.mark.parametrize(
    ("images", "expected"), [(130, (30, 60, 130)), (150, (30, 60, 150)), (31, (30, 31)), (61, (30, 61))]
)
def test_no_stage_but_a_first_one_is_much_larger_than_the_last(images, expected):
    """A last stage of fewer images than the one before it joins that one."""
    assert stages(images, 30) == expected


def test_slow_growth_never_stands_still():
    assert stages(6, 1, 1.01) == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("part", "label"),
    [((0, 0, 12), "images=12"), ((0, 30, 60), "images=30-60"), ((3, 0, 12), "images=12 (seed 3)")],
)
def test_a_report_names_places_not_syntax(part, label):
    assert ImageSlice(*part).label == label


def test_what_is_written_is_read_again():
    part = ImageSlice(5, 30, 60)
    assert ImageSlice.parse(str(part)) == part
    assert asked({"LMMS_PLUGIN_IMAGES": "5:30:60"}) == part
    assert asked({}) is None
    assert asked({"LMMS_PLUGIN_IMAGES": ""}) is None


@pytest.mark.parametrize("text", ["30", "0:30", "0:30:30", "0:60:30", "-1:0:30", "0:0:x", "0:0:30 "])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"LMMS_PLUGIN_IMAGES=.*expected seed:start:stop.*0:0:30"):
        ImageSlice.parse(text)
