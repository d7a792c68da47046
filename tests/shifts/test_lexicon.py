"""The packaged word lists are consistent, and replacing keeps the rest of an expression as it was."""

from collections import Counter

import pytest

from lmms_plugin.shifts.language import lexicon
from lmms_plugin.shifts.language.lexicon import alternatives, categories, find, noun, replace, synonyms, words


@pytest.mark.parametrize(
    ("written", "singular", "plural"),
    [
        ("shirt", "shirt", "shirts"),
        ("bush", "bush", "bushes"),
        ("box", "box", "boxes"),
        ("baby", "baby", "babies"),
        ("boy", "boy", "boys"),
        ("fire truck", "fire truck", "fire trucks"),
        ("man/men", "man", "men"),
        ("sheep/sheep", "sheep", "sheep"),
    ],
)
def test_plurals(written, singular, plural):
    assert noun(written) == (singular, plural)


def test_words_keep_hyphens_and_leave_apostrophes():
    assert [span.phrase for span in words("The man's T-shirt, 12!")] == ["the", "man", "s", "t-shirt", "12"]


def test_the_longest_phrase_is_found_and_nothing_twice():
    found = find("Teddy Bear next to a bear", {"bear", "teddy", "teddy bear", "next to"})
    assert [span.phrase for span in found] == ["teddy bear", "next to", "bear"]
    assert (found[0].start, found[0].stop) == (0, 10)


def test_a_phrase_does_not_reach_over_punctuation():
    assert [span.phrase for span in find("hot, dog", {"hot dog", "dog"})] == ["dog"]


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("a red apple", "red", "orange", "an orange apple"),
        ("an umbrella", "umbrella", "brolly", "a brolly"),
        ("A hat", "hat", "umbrella", "An umbrella"),
        ("an owl", "owl", "unicorn", "a unicorn"),
        ("Man in RED", "red", "green", "Man in GREEN"),
        ("Man in red", "man", "guy", "Guy in red"),
        ("the man's hat", "man", "woman", "the woman's hat"),
        ("banana car", "car", "truck", "banana truck"),
    ],
)
def test_replacing_keeps_case_and_sets_the_article_right(text, old, new, expected):
    (span,) = find(text, {old})
    assert replace(text, span, new) == expected


class TestSynonyms:
    def test_sizeable(self):
        assert len(synonyms()) > 600

    def test_mutual_and_never_the_word_itself(self):
        for phrase, others in synonyms().items():
            assert others
            assert phrase not in others
            for other in others:
                assert phrase in synonyms()[other], f"{other!r} is in two sets"

    def test_plural_for_plural(self):
        assert set(synonyms()["men"]) == {"guys", "fellows", "gentlemen", "dudes"}

    @pytest.mark.parametrize(
        "ambiguous", ["glass", "bat", "orange", "mouse", "top", "pitcher", "green", "left", "right"]
    )
    def test_words_of_two_meanings_are_left_alone(self, ambiguous):
        assert ambiguous not in synonyms()

    def test_a_synonym_is_of_the_same_category(self):
        known = categories().of
        for phrase, others in synonyms().items():
            for other in others:
                if phrase in known and other in known:
                    assert set(known[phrase]) & set(known[other]), (phrase, other)

    def test_a_synonym_excludes_what_the_word_excludes(self):
        of = alternatives().of
        for phrase, others in synonyms().items():
            for other in others:
                assert other not in (of[phrase].replacements if phrase in of else ()), (phrase, other)


class TestAlternatives:
    def test_no_replacement_says_about_the_same(self):
        like = alternatives().like
        for phrase, entry in alternatives().of.items():
            for new in entry.replacements:
                assert new not in like[phrase], (phrase, new)

    def test_every_word_stands_in_one_line(self):
        left = [phrase for group in set(alternatives().like.values()) for phrase in group]
        assert [word for word, times in Counter(left).items() if times > 1] == []

    def test_kinds(self):
        kinds = {entry.kind for entry in alternatives().of.values()}
        assert kinds == {"colour", "pattern", "hair", "material", "shape", "people", "animals", "clothing"}

    def test_number_is_kept(self):
        assert set(alternatives().of["women"].replacements) == {"men"}
        assert set(alternatives().of["helmets"].replacements) == {"crowns", "turbans", "top hats"}

    def test_parts_are_replaced_by_their_own_and_of_like_meaning(self):
        of, like = alternatives().of, alternatives().like
        assert (of["woman"].replacements, of["girl"].replacements) == (("man",), ("boy",))
        assert "girl" in like["woman"], "a photograph with a girl has a woman, as far as is known"
        assert of["blonde hair"].replacements == ("green hair", "pink hair")
        assert of["blonde"].replacements == ("green haired", "pink haired")

    @pytest.mark.parametrize("common", ["black", "white", "grey", "gray"])
    def test_colours_that_everything_has_are_never_put_in(self, common):
        assert all(common not in entry.replacements for entry in alternatives().of.values())


# COCO's own list of names, in its order, written down here independently of the packaged file.
_COCO = """person bicycle car motorcycle airplane bus train truck boat;traffic light;fire hydrant;stop sign;
parking meter;bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase;
frisbee skis snowboard;sports ball;kite;baseball bat;baseball glove;skateboard surfboard;tennis racket;bottle;
wine glass;cup fork knife spoon bowl banana apple sandwich orange broccoli carrot;hot dog;pizza donut cake chair couch;
potted plant;bed;dining table;toilet tv laptop mouse remote keyboard;cell phone;microwave oven toaster sink;
refrigerator book clock vase scissors;teddy bear;hair drier;toothbrush"""
_PHRASES = {
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "sports ball",
    "baseball bat",
    "baseball glove",
}
_PHRASES |= {"tennis racket", "wine glass", "hot dog", "potted plant", "dining table", "cell phone", "teddy bear"}
_PHRASES |= {"hair drier"}


class TestCategories:
    def test_cocos_eighty(self):
        parts = [" ".join(part.split()) for part in _COCO.split(";")]
        names = [name for part in parts for name in ([part] if part in _PHRASES else part.split())]
        coco = [category.name for category in categories().all if category.supercategory != "other"]
        assert len(names) == 80
        assert sorted(coco) == sorted(names)

    def test_what_may_well_be_there_unmentioned_is_not_offered(self):
        offered = {category.name for category in categories().all if category.offered}
        assert not offered & {"person", "chair", "car", "dining table", "cup", "bottle"}
        assert {"zebra", "toaster", "pizza"} <= offered
        assert not any(category.offered for category in categories().all if category.supercategory == "other")

    def test_glasses_are_worn_or_drunk_from(self):
        assert {category.name for category in categories().of["glasses"]} == {"eyewear", "wine glass"}

    def test_plurals(self):
        assert {"men", "zebras", "knives", "shorts"} <= categories().plurals
        assert not {"man", "bus", "dress", "sheep"} & categories().plurals


def test_lists_without_sections():
    assert {"um", "you know"} <= set(lexicon.plain("fillers"))
    assert {"the", "of"} <= set(lexicon.plain("function_words"))
