"""Language shifts: what they keep, what they change, and how much."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import photographs
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.shifts.language import phrasing, rewording
from lmms_plugin.shifts.language.lexicon import synonyms
from lmms_plugin.shifts.language.rewording import NEIGHBOURS, TEXT_SHIFTS, apply
from lmms_plugin.shifts.severities import SEVERITIES

NAMES = tuple(TEXT_SHIFTS)
# In RefCOCO+'s manner, beside those about the photographs of the fixtures.
EXPRESSIONS = (
    "man in red shirt",
    "the woman with a striped umbrella standing",
    "zebra closest to the camera eating grass",
    "half eaten sandwich on the wooden table",
    "kid wearing blue shorts and a white hat",
    "big white teddy bear",
    "Black dog",
    "lady with glasses",
    "guy",
    *(e for split in photographs.REFERENTS.values() for referent in split for e in referent.expressions),
)
every_shift = pytest.mark.parametrize("name", NAMES)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)
texts = st.text(st.sampled_from("abcXYZ redmanshirt 0'-,.é"), min_size=0, max_size=40)


def distance(one, other):
    """Levenshtein's, by the textbook's recurrence."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        previous, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def word_distance(one, other):
    return distance(one.split(), other.split())


def shifted(name, severity, expressions=EXPRESSIONS, keys=range(3)):
    pairs = ((e, apply(e, name, severity, f"{e}/{key}")) for e in expressions for key in keys)
    return [(original, new) for original, new in pairs if new is not None]


@every_shift
@every_severity
def test_same_key_same_text_whatever_was_shifted_before(name, severity):
    first = apply("man in red shirt with a hat", name, severity, key="7")
    apply("something else", name, severity, key="8")
    assert apply("man in red shirt with a hat", name, severity, key=7) == first


@every_shift
def test_another_key_gives_another_text_somewhere(name):
    text = "the man in a red shirt and blue jeans next to the small white dog with long hair"
    assert len({apply(text, name, 2, key) for key in range(12)}) > 1


@every_shift
@every_severity
def test_never_silently_the_original(name, severity):
    for expression in EXPRESSIONS:
        for key in range(4):
            assert apply(expression, name, severity, key) != expression


@every_shift
@given(severity=st.sampled_from(SEVERITIES), text=texts, key=st.integers(0, 1000))
def test_any_text_is_changed_or_refused(name, severity, text, key):
    new = apply(text, name, severity, key)
    assert new is None or (new != text and new.strip())


@every_shift
def test_severity_changes_more_on_average(name):
    measure = word_distance if name in ("reordered_words", "dropped_words", "fillers") else distance
    means = [np.mean([measure(*pair) for pair in shifted(name, severity)]) for severity in SEVERITIES]
    assert means[0] > 0
    assert means[-1] > means[0]
    # By chance a step may be lost, as where every severity can change one word only.
    assert all(later >= earlier - 0.15 for earlier, later in pairwise(means)), means


@every_shift
def test_whether_an_expression_can_be_shifted_does_not_depend_on_severity(name):
    for expression in EXPRESSIONS:
        for key in range(2):
            assert len({apply(expression, name, severity, key) is None for severity in SEVERITIES}) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keyboard_typos", "12"),
        ("swapped_letters", "aa b"),
        ("dropped_letters", "a b"),
        ("casing", "12"),
        ("spacing", "5"),
        ("fillers", " "),
        ("dropped_words", "woman"),
        ("reordered_words", "no no"),
        ("synonyms", "zebra"),
        ("paraphrase", "the "),
    ],
)
def test_nothing_to_change_is_none(name, text):
    assert all(apply(text, name, severity, key=0) is None for severity in SEVERITIES)


@every_severity
class TestTyping:
    def test_a_typo_is_a_neighbouring_key_in_the_same_case(self, severity):
        for original, new in shifted("keyboard_typos", severity):
            assert len(original) == len(new)
            for a, b in zip(original, new, strict=True):
                assert a == b or (b.lower() in NEIGHBOURS[a.lower()] and a.isupper() == b.isupper())

    def test_swapping_keeps_the_letters_of_every_word(self, severity):
        for original, new in shifted("swapped_letters", severity):
            assert [sorted(word) for word in original.split()] == [sorted(word) for word in new.split()]

    def test_dropping_letters_keeps_their_order_and_every_word(self, severity):
        for original, new in shifted("dropped_letters", severity):
            assert len(new) < len(original)
            letters = iter(original)
            assert all(letter in letters for letter in new)
            assert len(new.split()) == len(original.split())

    def test_casing_keeps_the_letters(self, severity):
        for original, new in shifted("casing", severity):
            assert new.lower() == original.lower()

    def test_spacing_keeps_everything_but_spaces(self, severity):
        for original, new in shifted("spacing", severity):
            assert new.replace(" ", "") == original.replace(" ", "")


@every_severity
class TestWords:
    def test_fillers_leave_the_words_in_order(self, severity):
        for original, new in shifted("fillers", severity):
            left = iter(new.split())
            assert all(word in left for word in original.split())

    def test_dropping_leaves_a_word_and_keeps_the_order(self, severity):
        for original, new in shifted("dropped_words", severity):
            assert 1 <= len(new.split()) < len(original.split())
            left = iter(original.split())
            assert all(word in left for word in new.split())

    def test_reordering_keeps_all_words(self, severity):
        for original, new in shifted("reordered_words", severity):
            assert sorted(new.split()) == sorted(original.split())


def test_a_telegram_loses_its_articles_first():
    text = "the woman with a striped umbrella"
    assert {apply(text, "dropped_words", 1, key) for key in range(40)} == {
        "woman with a striped umbrella",
        "the woman a striped umbrella",
        "the woman with striped umbrella",
    }


@every_severity
@pytest.mark.parametrize("text", ["man without a hat", "the one that is not red", "guy who isn't in blue"])
def test_a_telegram_keeps_what_negates(text, severity):
    kept = {apply(text, "dropped_words", severity, key) for key in range(20)}
    assert all(any(word in shifted.split() for word in ("without", "not", "isn't")) for shifted in kept)


def test_of_a_negation_and_one_word_nothing_is_dropped():
    assert apply("no hat", "dropped_words", 5, 0) is None


def test_caps_lock_on_every_word():
    assert apply("Man in red", "casing", 5, key=0) == "mAN IN RED"


def test_neighbours_touch_on_the_keyboard():
    assert set(NEIGHBOURS["g"]) == set("rtyfhvb") - {"r"}
    assert set(NEIGHBOURS["q"]) == set("wa")
    assert set(NEIGHBOURS["m"]) == set("njk")
    assert all(a in NEIGHBOURS[b] for a in NEIGHBOURS for b in NEIGHBOURS[a])


def test_synonyms_are_those_of_the_list():
    seen = {apply("man in red shirt", "synonyms", 5, key) for key in range(60)}
    assert seen == {f"{other} in red shirt" for other in synonyms()["man"]}


def test_a_phrase_is_replaced_as_a_whole():
    assert apply("teddy bear next to couch", "synonyms", 5, key=1).split()[0] in {"stuffed", "teddy"}
    assert " next " not in apply("bench next to the wall", "synonyms", 5, key=1)


class TestParaphrase:
    @pytest.mark.parametrize(
        ("text", "rebuilt"),
        [
            ("man in red shirt", ["dressed in", "shirt that is red"]),
            ("guy in orange", ["dressed in"]),
            ("boys in blue shorts", ["dressed in", "shorts that are blue"]),
            ("cup with red handle", ["that has"]),
            ("lady with glasses", ["who has"]),
            ("zebra eating grass", ["that is eating"]),
            ("men standing", ["who are standing"]),
        ],
    )
    def test_constructions(self, text, rebuilt):
        places = [place.rebuilt.strip() for place in phrasing.rebuildings(text)]
        assert [r.removeprefix("who is ") for r in places] == rebuilt

    @pytest.mark.parametrize(
        "text",
        [
            "blue and white bus",
            "dark brown horse",
            "red shirt guy",
            "red and white striped shirt",
            "the building",
            "12",
        ],
    )
    def test_what_would_change_the_meaning_is_left(self, text):
        assert phrasing.rebuildings(text) == []

    def test_the_article_fits_the_noun_that_comes_first_now(self):
        new = {apply("woman with a striped umbrella", "paraphrase", 3, key) for key in range(10)}
        assert new == {"woman who has an umbrella that is striped"}

    def test_a_clause_frames_it_at_severity_five(self):
        new = apply("the red circle", "paraphrase", 5, key=3)
        assert "red circle" in new
        assert len(new.split()) >= 7


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("keyboard_typo", 1, "did you mean 'keyboard_typos'"),
        ("casing", 0, "from 1 to 5"),
        ("casing", True, "from 1 to 5"),
    ],
)
def test_bad_arguments_say_what_was_expected(name, severity, message):
    with pytest.raises(ValueError, match=message):
        apply("man", name, severity, key=0)


def test_a_key_is_text_or_a_number():
    with pytest.raises(TypeError, match="got float"):
        apply("man", "casing", 1, key=0.5)


def test_a_shift_needs_five_levels():
    with pytest.raises(ValueError, match="expected 5 levels, got 1"):
        rewording.text_shift((1,))


def test_the_examples_of_the_documentation_are_what_the_code_makes():
    page = (Path(__file__).parents[2] / "docs" / "language_shift.md").read_text(encoding="utf-8")
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    shown = {row[0]: row[1:] for row in rows if len(row) == 4 and row[0] in TEXT_SHIFTS}
    text = "The man in a red shirt with the striped umbrella"
    assert shown == {name: [apply(text, name, severity, "docs") for severity in (1, 3, 5)] for name in TEXT_SHIFTS}
