import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.shifts.image.moving import MOVING
from lmms_plugin.shifts.language.directions import RULES, cropped, kept, mirrored, turned


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("left man", "right man"),
        ("man on right in blue", "man on left in blue"),
        ("Right guy", "Left guy"),
        ("LEFT", "RIGHT"),
        ("leftmost cow", "rightmost cow"),
        ("left most cow", "right most cow"),
        ("top-left pizza", "top-right pizza"),
        ("topleft, not bottomright", "topright, not bottomleft"),
        ("far right", "far left"),
        ("one left of the tree", "one right of the tree"),
        ("man to the left of the right car", "man to the right of the left car"),
        ("person facing left", "person facing right"),
        ("the right one", "the left one"),
        # The mirror image of a right-handed batter bats left-handed.
        ("left hand up", "right hand up"),
        ("right-handed batter", "left-handed batter"),
        ("his left", "his right"),
        ("lefty", "righty"),
        ("the left one's right side", "the right one's left side"),
        ("person left of the tree", "person right of the tree"),
        ("the left standing man", "the right standing man"),
        ("two left ones", "two right ones"),
        ("2nd from left", "2nd from right"),
        ("the 2 left dogs", "the 2 right dogs"),
        ("left man's hat", "right man's hat"),
    ],
)
def test_left_and_right_change_places(expression, expected):
    assert mirrored(expression) == expected
    assert mirrored(expected) == expression


def test_quotes_and_hyphens_of_print_are_those_of_a_typewriter():
    assert mirrored("the left one\u2019s top\u2011right corner") == "the right one's top-left corner"
    assert mirrored("\uff4c\uff45\uff46\uff54 dog") == "right dog"
    assert mirrored("le\u200bft dog") == "right dog"
    assert mirrored("the caf\u00e9\u2019s chair") == "the caf\u00e9\u2019s chair"


def test_an_adverb_may_arise_but_is_not_read_as_a_side():
    assert mirrored("left in blue") == "right in blue"
    assert mirrored("right in the middle") is None


@pytest.mark.parametrize(
    "expression",
    ["red car", "upright bottle", "bright shirt", "frightened wheelwright", "woman in front", "top bunk", ""],
)
def test_what_knows_no_sides_stays(expression):
    assert mirrored(expression) == expression


@pytest.mark.parametrize(
    "expression",
    [
        "woman right next to him",
        "cow right behind",
        "guy right in white",
        "right way up",
        "right side up",
        "the right size",
        "all right",
        "one left",
        "last slice left",
        "food left on plate",
        "leftover food",
        "the man who left",
        "bag left behind",
        "l guy",
        "guy on rt",
        "rigth dog",
        "at 3 o'clock",
        "turned clockwise",
        "west side",
        "player number 12",
        "bus that says school",
        "letter A",
        "#7",
        "right-of-way sign",
        "right-angled bench",
        "leftdog",
        "girlright",
        "leftright",
        "left2",
        "left_hand",
        "9 o\u2019clock",
        "at 3:00",
        "rightside up",
        "looking right at us",
        "coat left hanging",
        "woman left by herself",
        "two left",
        "what's left of the cake",
        "right triangle",
        "starboard lamp",
        "port side",
        "the lhs",
        "jersey 23",
        "player 5",
        "5 on shirt",
        "the one reading 'exit'",
        "sign with \u201cstop\u201d",
        "license plate",
        # Another language, another script, and letters that only look like others.
        "der linke Mann",
        "homme \u00e0 gauche",
        "hombre a la derecha",
        "\u5de6\u8fb9\u7684\u4eba",
        "\u0441\u043b\u0435\u0432\u0430",
        # One of two is unclear.
        "left man right next to her",
    ],
)
def test_what_is_unclear_in_a_mirror_is_left_out(expression):
    assert mirrored(expression) is None


@pytest.mark.parametrize(
    "expression",
    [
        "left man",
        "top bunk",
        "cup under table",
        "the lower shelf",
        "highest kite",
        "upside down cup",
        "topright",
        "leftdog",
        "9 o\u2019clock",
        "der rechte Mann",
        "\u4e0a\u9762\u7684\u4eba",
    ],
)
def test_a_quarter_turn_leaves_out_what_has_a_direction(expression):
    assert turned(expression) is None


@pytest.mark.parametrize("expression", ["red car", "man with hat", "stopped bus", "brightest"])
def test_a_quarter_turn_keeps_the_rest(expression):
    assert turned(expression) == expression


@pytest.mark.parametrize(
    "expression",
    [
        "in the corner",
        "second from left",
        "3rd cow",
        "middle man",
        "half a dog",
        "cut off",
        "last one",
        "two from the left",
        "top of the picture",
        "barely visible dog",
        "\u4e2d\u95f4\u7684\u4eba",
    ],
)
def test_a_crop_leaves_out_places_in_the_frame_and_counting(expression):
    assert cropped(expression) is None


@pytest.mark.parametrize("expression", ["leftmost cow", "red car", "largest dog", "centaur"])
def test_a_crop_keeps_what_stays_true(expression):
    assert cropped(expression) == expression


def test_every_moving_shift_has_a_rule():
    assert {shift.words for shift in MOVING.values()} == set(RULES)
    assert kept("left man") == "left man"


@given(
    st.lists(st.sampled_from(["left", "right", "the", "man", "on", "of", "one", "Left-most", "in", "hat"]), max_size=7)
)
def test_two_mirrors_give_the_expression_back(words):
    text = " ".join(words)
    once = mirrored(text)
    if once is not None and (twice := mirrored(once)) is not None:
        assert twice == text


@given(
    st.text()
    | st.lists(st.sampled_from(["left", "Right", "'", "\u2019", "-", " ", "1", "\u5de6", "o'clock"])).map("".join)
)
def test_any_text_is_kept_changed_or_left_out(text):
    for rule in RULES.values():
        assert (kept_as := rule(text)) is None or isinstance(kept_as, str)
    for unchanged in (cropped, turned):
        assert unchanged(text) in (text, None)
    if (once := mirrored(text)) is not None and text.isascii():
        assert mirrored(once) in (text, None)
