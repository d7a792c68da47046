"""Expressions that are to match nothing: what is changed, that nothing of it is there, and pairs of documents."""

import datasets
import pytest
from helpers import photographs

from lmms_plugin.demo import DATA, scene_mismatches
from lmms_plugin.demo.scenes import scene
from lmms_plugin.demo.wording import Attributes, meaning
from lmms_plugin.shifts.language.lexicon import alternatives, categories
from lmms_plugin.shifts.language.mismatches import (
    absent_objects,
    attribute_swaps,
    head_noun,
    one_of,
    swaps_about_photographs,
)
from lmms_plugin.shifts.language.negation import negators
from lmms_plugin.tasks.grounding import language_shifts, mentions, reworded
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.mentions import Mentions
from lmms_plugin.utils.copies import DatasetError


@pytest.mark.parametrize(
    ("expression", "head"),
    [
        ("man in red shirt", "man"),
        ("red shirt guy on couch", "guy"),
        ("slice of pizza", "slice"),
        ("bunch of bananas", "bananas"),
        ("smiling woman", "woman"),
        ("zebra facing away from giraffe", "zebra"),
        ("fire hydrant next to car", "fire hydrant"),
        ("orange", "orange"),
        ("orange in bowl", "orange"),
        ("orange flower", None),
        ("guy in orange", "guy"),
        ("temple", None),
    ],
)
def test_head_noun(expression, head):
    found = head_noun(expression, categories())
    assert (found.phrase if found else None) == head


def test_swaps_change_one_word_and_keep_the_rest():
    swaps = attribute_swaps("Man in red shirt", alternatives())
    assert {swap.expression for swap in swaps} >= {"Woman in red shirt", "Man in green shirt", "Man in red kimono"}
    for swap in swaps:
        assert swap.new in swap.expression.lower()
        assert swap.expression.lower().replace(swap.new, swap.old, 1) == "man in red shirt"


# How people write in RefCOCO+: short, without punctuation, often without apostrophes.
NEGATED = {
    "man without glasses": {"man"},
    "man w/o hat in red": {"man"},
    "guy with no shirt": {"guy"},
    "not the red one": set(),
    "the one that is not red": set(),
    "kid in blue, not the girl in red": {"blue"},
    "not red, green or blue": set(),
    "guy who isn't wearing red": {"guy"},
    "guy who isn\u2019t wearing red": {"guy"},
    "guy isnt wearing a hat": {"guy"},
    "boy that doesnt have a helmet": {"boy"},
    "shirt that was never red": {"shirt"},
    "everyone except the man": set(),
    "everyone but the man in red": set(),
    "all but the red one": set(),
    "person other than the girl": set(),
    "non-striped shirt": set(),
    "non striped shirt": set(),
    "guy with his shirt off": {"guy"},
    "zebra minus the bird": {"zebra"},
    "not the girl but the guy in red": {"guy", "red"},
    "man in front": {"man"},
    "giant cow with a plant": {"cow"},
    "man holding knot": {"man"},
}


@pytest.mark.parametrize("expression", NEGATED)
def test_what_is_negated_is_not_swapped(expression):
    assert {swap.old for swap in swaps_about_photographs(expression)} == NEGATED[expression]


@pytest.mark.parametrize("expression", ["not the man", "the one without a hat", "no dog", "everyone but the woman"])
def test_no_absent_object_is_put_where_it_is_denied(expression):
    assert absent_objects(expression, categories(), categories().all) == []


def test_words_that_negate():
    assert [found.phrase for found in negators("Not a knot, can't notice none")] == ["not", "can't", "none"]


# What each word of the expression becomes; nothing where a swap would leave nonsense.
WRITTEN = {
    "ice cream cone": set(),
    "the orange with a sticker": set(),
    "orange cut in half": set(),
    "orange": set(),
    "orange cat": {"purple cat", "green cat", "orange rabbit", "orange fox", "orange penguin"},
    "one in orange": {"one in purple", "one in green"},
    "polo player": set(),
    "polo shirt": {"ball gown", "spacesuit", "kimono"},
    "baseball cap": {"crown", "turban", "gas mask"},
    "ski boot": {"roller skate", "flipper", "clog"},
    "jeans": {"lederhosen", "waders"},
    "sunglasses": {"binoculars", "earmuffs"},
    "wine glasses": set(),
    "the blonde": set(),
    "blonde hair": {"green hair", "pink hair"},
    "brunette kid": {"green haired kid", "pink haired kid"},
    "kid in plaid": set(),
    "piece of wood": {"piece of marble", "piece of wicker"},
    "wooden chair": {"marble chair", "inflatable chair"},
    "elderly man": {"elderly woman"},
    "baby boy": set(),
    "little boy": {"little girl"},
    "mom elephant": {"mom camel", "mom hippo", "mom cow"},
    "white guy": {"white woman"},
    "hot dog": set(),
    "teddy bear": set(),
    "pony tail": set(),
    "navy blue truck": {"orange truck", "yellow truck", "pink truck"},
    "teal blue truck": set(),
    "tie dye": set(),
}


@pytest.mark.parametrize("expression", WRITTEN)
def test_swaps_leave_english(expression):
    assert {swap.expression for swap in swaps_about_photographs(expression)} == WRITTEN[expression]


@pytest.mark.parametrize(
    ("expression", "changed"),
    [
        ("baseball player", "zebra"),
        ("tennis player in white", "zebra in white"),
        ("cup of coffee", "zebra"),
        ("glass of something", None),
        ("red shirt guy", "red zebra"),
        ("life jacket", "zebra"),
        ("snow man", "zebra"),
    ],
)
def test_an_absent_object_replaces_the_whole_name(expression, changed):
    zebra = [category for category in categories().all if category.name == "zebra"]
    assert [m.expression for m in absent_objects(expression, categories(), zebra)] == ([changed] if changed else [])


def test_an_absent_object_takes_the_number_of_the_one_it_replaces():
    zebra = [category for category in categories().all if category.name == "zebra"]
    assert [m.expression for m in absent_objects("two dogs on a couch", categories(), zebra)] == [
        "two zebras on a couch"
    ]
    assert [m.expression for m in absent_objects("a dog", categories(), zebra)] == ["a zebra"]


def test_the_choice_follows_from_key_and_name_and_reaches_every_place():
    swaps = attribute_swaps("man in red shirt", alternatives())
    chosen = [one_of(swaps, "attribute_swap", key) for key in range(60)]
    assert chosen == [one_of(swaps, "attribute_swap", str(key)) for key in range(60)]
    assert {swap.old for swap in chosen} == {"man", "red", "shirt"}
    assert one_of([], "attribute_swap", 0) is None


class TestPhotographs:
    @pytest.fixture(scope="class")
    def known(self):
        return Mentions(ExpressionDocs(photographs.rows("testA")))

    def test_nothing_mentioned_about_the_photograph_is_put_in(self, known):
        about = "COCO_train2014_000000000000"  # woman, face, brown hair, black helmet, white rim
        swaps = known.attribute_swaps("man in blue shirt", about)
        assert "woman" not in {swap.new for swap in swaps}
        assert "girl" not in {swap.new for swap in swaps}, "a girl is a woman"
        assert "zebra" in {m.new for m in known.absent_objects("man", about)}

    def test_no_object_of_a_supercategory_that_is_mentioned(self, known):
        absent = {m.new for m in known.absent_objects("cup", "a photograph that nobody speaks of")}
        kitchen = {c.noun.singular for c in categories().all if c.supercategory == "kitchen"}
        mentioned = known.absent_objects("cup", _about("cup of coffee"))
        assert kitchen & absent
        assert not kitchen & {m.new for m in mentioned}

    @pytest.mark.parametrize("make", [mentions.attribute_swap, mentions.absent_object], ids=["swap", "absent"])
    def test_documents_come_in_pairs(self, make):
        rows = photographs.rows("testA")
        docs = make(rows)
        written = {doc["expression_id"]: doc["expression"] for doc in ExpressionDocs(rows).remove_columns("image")}
        contents = [docs.content(i) for i in range(len(docs))]
        for true, changed in zip(contents[::2], contents[1::2], strict=True):
            assert true["matches"]
            assert not changed["matches"]
            assert true["pair"] == changed["pair"] == true["expression_id"]
            assert true["expression"] == changed["original_expression"] == written[true["pair"]]
            assert changed["expression"] != true["expression"]
            assert changed["expression_id"] == f"{true['pair']}/changed"
        assert contents[0]["shifted_rate"] == len(docs) / (2 * len(written))

    def test_images_and_keys_are_those_of_the_original(self):
        docs = mentions.attribute_swap(photographs.rows("testA"))
        assert docs[1]["image"].size == (docs[1]["width"], docs[1]["height"])
        assert docs.image_key(0) == docs.image_key(1) == docs[1]["image_id"]
        assert "image" not in docs.remove_columns("image")[0]


def _about(expression):
    docs = ExpressionDocs(photographs.rows("testA")).remove_columns("image")
    return next(doc["image_id"] for doc in docs if doc["expression"] == expression)


class TestDemo:
    @pytest.fixture(scope="class")
    def rows(self):
        return datasets.load_dataset(DATA, split="test").select(range(60))

    @pytest.mark.parametrize(
        "make", [scene_mismatches.attribute_swap, scene_mismatches.absent_object], ids=["swap", "absent"]
    )
    def test_changed_expressions_match_nothing_and_true_ones_one_object(self, rows, make):
        docs = make(rows)
        for i in range(len(docs)):
            doc = docs.content(i)
            number = int(doc["file_name"].removesuffix(".jpg").split("_")[2])
            objects = scene("test", number, max_objects=3).objects
            said = meaning(doc["expression"])
            fitting = [o for o in objects if all(getattr(o.attributes, name) == said[name] for name in said)]
            assert len(fitting) == doc["matches"], doc["expression"]

    def test_every_attribute_is_swapped(self, rows):
        docs = scene_mismatches.attribute_swap(rows)
        kinds = {docs.content(i)["change"]["kind"] for i in range(1, len(docs), 2)}
        assert kinds == set(Attributes._fields)

    def test_other_scenes_are_an_error(self, rows):
        other = rows.map(lambda row: {"bbox": [value + 1 for value in row["bbox"]]})
        with pytest.raises(DatasetError, match="another one is drawn"):
            scene_mismatches.attribute_swap(other)

    @pytest.mark.parametrize(
        ("expression", "said"),
        [
            ("the small red one without a hole", {"size": "small", "colour": "red", "fill": "plain"}),
            ("plus sign that is hollow and big", {"shape": "cross", "fill": "hollow", "size": "large"}),
            ("round thing", {"shape": "circle"}),
        ],
    )
    def test_meaning(self, expression, said):
        assert meaning(expression) == said

    def test_meaning_of_other_words_is_refused(self):
        with pytest.raises(ValueError, match="pink"):
            meaning("pink circle")


class TestShifted:
    def test_what_cannot_be_shifted_is_left_out_and_counted(self):
        rows = photographs.rows("testA")
        docs = reworded.shifted(ExpressionDocs(rows), "dropped_words", 3)
        expressions = [doc["expression"] for doc in ExpressionDocs(rows).remove_columns("image")]
        long = [expression for expression in expressions if len(expression.split()) > 1]
        assert [docs.content(i)["original_expression"] for i in range(len(docs))] == long
        assert docs.content(0)["shifted_rate"] == len(long) / len(expressions) < 1
        assert all(docs.content(i)["expression"] != long[i] for i in range(len(docs)))

    def test_ids_are_those_of_the_clean_task(self):
        rows = photographs.rows("testB")
        docs = language_shifts.keyboard_typos_3(rows)
        assert [docs.content(i)["expression_id"] for i in range(len(docs))] == [
            doc["expression_id"] for doc in ExpressionDocs(rows).remove_columns("image")
        ]

    def test_nothing_to_shift_is_an_error(self):
        rows = photographs.rows("testA").select([1]).map(lambda row: {"answer": ["helmet"]})
        with pytest.raises(DatasetError, match="allow dropped_words at severity 3, got none among 1"):
            reworded.shifted(ExpressionDocs(rows), "dropped_words", 3)

    def test_unknown_shift(self):
        with pytest.raises(AttributeError, match="no attribute 'keyboard_typo_3'"):
            _ = language_shifts.keyboard_typo_3
