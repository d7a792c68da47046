"""Dialects: each family's published answers, then what must hold for any answer."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index, patch_index_to_coordinate
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from lmms_plugin.protocol.boxes import OVERSHOOT, Box
from lmms_plugin.protocol.dialects import DIALECTS, Frame, Parsed, dialect_for

ORIGINAL = (640, 480)
RESIZED = (644, 476)  # what Qwen2.5-VL makes of 640x480
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)


def parse(name: str, text: str, original_size=ORIGINAL, model_size=RESIZED) -> Parsed:
    return DIALECTS[name].parse(text, original_size=original_size, model_size=model_size)


# --- published answers ----------------------------------------------------------------------------

BACK = "<|ref|>The giraffe at the back.<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>"
GIRAFFES = (
    "<|ref|>The giraffe at the back<|/ref|><|det|>[[580, 270, 999, 904]]<|/det|>"
    "<|ref|>The giraffe at the front<|/ref|><|det|>[[26, 31, 632, 998]]<|/det|><\uff5cend\u2581of\u2581sentence\uff5c>"
)
SNOWMAN = "<grounding><phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>"
FIRE = " is warming himself by<phrase> the fire</phrase><object><patch_index_0006><patch_index_0878></object>"
CAR = "</s><s>car<loc_53><loc_334><loc_933><loc_775>door handle<loc_425><loc_504><loc_474><loc_516></s><pad>"
JSON = '```json\n[\n\t{"bbox_2d": [322, 119, 483, 357], "label": "cat"}\n]\n```'
QWEN3 = '[{"bbox_2d": [513, 454, 570, 556], "label": "cube"}, {"bbox_2d": [349, 680, 401, 780], "label": "cube"}]'
PIXELS = (322 / 644, 119 / 476, 483 / 644, 357 / 476)
GEMMA4 = (
    '```json\n[\n  {"box_2d": [244, 256, 948, 405], "label": "person"},\n'
    '  {"box_2d": [357, 606, 655, 803], "label": "cat"}\n]\n```'
)
# No answer is published of LFM2.5-VL, Qwen3-Omni and ERNIE-4.5-VL: these have the form of their sources.
LFM = '[{"label": "dog", "bbox": [0.12, 0.3, 0.58, 0.91]}]'
BIRDS = (
    "The image features a serene scene with <ref>three birds</ref>[\n  <box>(0.401,0.526),(0.430,0.557)</box>,\n"
    "  <box>(0.489,0.494),(0.516,0.526)</box>,\n  <box>(0.296,0.529),(0.324,0.576)</box>\n] flying in formation"
)
GLM = "\nThe coordinates of the second bottle of beer are <|begin_of_box|>[[94,598,177,991]]<|end_of_box|>."
GLM_BOX = (0.094, 0.598, 0.177, 0.991)


@pytest.mark.parametrize(
    ("name", "text", "box", "count"),
    [
        pytest.param("fractions", "[0.1, 0.25, 0.6, 0.75]", (0.1, 0.25, 0.6, 0.75), 1, id="fractions"),
        pytest.param("fractions", "It is (0.1, 0.25, 0.6, 1).", (0.1, 0.25, 0.6, 1), 1, id="fractions-parentheses"),
        pytest.param("demo", "[12,34,56,78]", (0.12, 0.34, 0.56, 0.78), 1, id="demo"),
        pytest.param("demo", "[00,05,99,09]", (0, 0.05, 0.99, 0.09), 1, id="demo-zero-padded"),
        pytest.param(
            "qwen2_vl",
            "<|object_ref_start|>language switch<|object_ref_end|><|box_start|>(576,12),(592,42)<|box_end|><|im_end|>",
            (0.576, 0.012, 0.592, 0.042),
            1,
            id="qwen2-vl",
        ),
        pytest.param(
            "qwen2_vl", "language switch(576,12),(592,42)", (0.576, 0.012, 0.592, 0.042), 1, id="qwen2-vl-tags-stripped"
        ),
        pytest.param(
            "qwen2_vl",
            "<|box_start|>(530,351),(602,516)<|box_end|><|box_start|>(176,106),(232,160)<|box_end|>",
            (0.53, 0.351, 0.602, 0.516),
            2,
            id="qwen2-vl-two",
        ),
        pytest.param("qwen2_5_vl", JSON, PIXELS, 1, id="qwen2.5-vl"),
        pytest.param("qwen2_5_vl", '{\n"bbox_2d": [322, 119, 483, 357]\n}', PIXELS, 1, id="qwen2.5-vl-no-fence"),
        pytest.param("qwen2_5_vl", JSON[:-8] + '},\n\t{"bbox_2d": [10, 20,', PIXELS, 1, id="qwen2.5-vl-truncated"),
        pytest.param(
            "qwen2_5_vl",
            '[\n  {\n    "bbox_2d": [\n      322,\n      119,\n      483,\n      357\n    ]\n  }\n]',
            PIXELS,
            1,
            id="qwen2.5-vl-indented",
        ),
        pytest.param("qwen3_vl", QWEN3, (0.513, 0.454, 0.57, 0.556), 2, id="qwen3-vl-two"),
        pytest.param(
            "internvl", "<ref>bus</ref><box>[[290, 202, 835, 851]]</box>", (0.29, 0.202, 0.835, 0.851), 1, id="internvl"
        ),
        pytest.param("internvl", "bus[[290, 202, 835, 851]]", (0.29, 0.202, 0.835, 0.851), 1, id="internvl-stripped"),
        pytest.param(
            "internvl",
            "<box>[[278,24,354,100],[515,10,611,106]]</box>",
            (0.278, 0.024, 0.354, 0.1),
            2,
            id="internvl-two",
        ),
        # 640x480 padded to 640x640: 80 rows above the image, so y = (0.36 * 640 - 80) / 480.
        pytest.param(
            "llava",
            "[0.61, 0.36, 0.92, 0.83]",
            (0.61, (0.36 * 640 - 80) / 480, 0.92, (0.83 * 640 - 80) / 480),
            1,
            id="llava-1.5",
        ),
        # The middle 480 columns of 640: x = (0.61 * 480 + 80) / 640.
        pytest.param(
            "llava_cropped",
            "[0.61, 0.36, 0.92, 0.83]",
            ((0.61 * 480 + 80) / 640, 0.36, (0.92 * 480 + 80) / 640, 0.83),
            1,
            id="llava-1.5-cropped",
        ),
        pytest.param("llava_onevision", "[0.61, 0.36, 0.92, 0.83]", (0.61, 0.36, 0.92, 0.83), 1, id="llava-onevision"),
        pytest.param(
            "paligemma",
            "<loc0256><loc0128><loc0768><loc0512> cat",
            (128 / 1024, 256 / 1024, 512 / 1024, 768 / 1024),
            1,
            id="paligemma-rows-first",
        ),
        pytest.param(
            "paligemma",
            "<loc0256><loc0256><loc0768><loc0768> cat ; <loc0256><loc0256><loc0768> cat",
            (0.25, 0.25, 0.75, 0.75),
            1,
            id="paligemma-truncated",
        ),
        pytest.param("florence2", CAR, (0.0535, 0.3345, 0.9335, 0.7755), 2, id="florence-2"),
        pytest.param("kosmos2", SNOWMAN + FIRE, (0.390625, 0.046875, 0.984375, 0.828125), 2, id="kosmos-2"),
        pytest.param("kosmos2", FIRE, (0.203125, 0.015625, 0.453125, 0.859375), 1, id="kosmos-2-fire"),
        pytest.param("deepseek_vl2", BACK, (580 / 999, 270 / 999, 1, 900 / 999), 1, id="deepseek-vl2"),
        pytest.param("deepseek_vl2", GIRAFFES, (580 / 999, 270 / 999, 1, 904 / 999), 2, id="deepseek-vl2-two"),
        pytest.param(
            "shikra",
            "Answer: [0.125,0.250,0.625,0.500] .",
            (0.125, (0.25 * 640 - 80) / 480, 0.625, (0.5 * 640 - 80) / 480),
            1,
            id="shikra",
        ),
        pytest.param(
            "shikra",
            "[0.125,0.250,0.625,0.500;0.200,0.300,0.400,0.500]",
            (0.125, (0.25 * 640 - 80) / 480, 0.625, (0.5 * 640 - 80) / 480),
            2,
            id="shikra-two-in-one-list",
        ),
        pytest.param("glm4v", GLM, GLM_BOX, 1, id="glm-4.6v"),
        pytest.param("glm4v", "<think>maybe [[1,2,3,4]]</think>" + GLM, GLM_BOX, 1, id="glm-4.6v-thinking"),
        pytest.param("glm4v", "<|begin_of_box|><94,598,177,991><|end_of_box|>", GLM_BOX, 1, id="glm-4.5v-angles"),
        # The answer of the notebook that publishes prompt and format, and one that spaces its numbers.
        pytest.param("perception_lm", "[040,482,112,576]", (0.04, 0.482, 0.112, 0.576), 1, id="perception-lm"),
        pytest.param("perception_lm", "[123, 456, 789, 912]", (0.123, 0.456, 0.789, 0.912), 1, id="perception-lm-2"),
        # The answers of ai.google.dev/gemma/docs/capabilities/vision/image to "detect person and cat".
        pytest.param("gemma4", GEMMA4, (0.256, 0.244, 0.405, 0.948), 2, id="gemma-4-rows-first"),
        pytest.param("gemma4", "[244, 256, 948, 405]", (0.256, 0.244, 0.405, 0.948), 1, id="gemma-4-bare"),
        pytest.param("lfm2_vl", LFM, (0.12, 0.3, 0.58, 0.91), 1, id="lfm2.5-vl"),
        # The example of the model card of Ovis2.5.
        pytest.param("ovis2_5", BIRDS, (0.401, 0.526, 0.430, 0.557), 3, id="ovis2.5-three"),
        pytest.param("qwen3_omni", QWEN3, (0.513, 0.454, 0.57, 0.556), 2, id="qwen3-omni-two"),
        pytest.param("ernie4_5_vl", QWEN3, (0.513, 0.454, 0.57, 0.556), 2, id="ernie-4.5-vl-two"),
        pytest.param("qwen2_5_omni", "[0.2, 0.3, 0.4, 0.5]", (0.2, 0.3, 0.4, 0.5), 1, id="qwen2.5-omni"),
        pytest.param("idefics3", " [0.2, 0.3, 0.4, 0.5]", (0.2, 0.3, 0.4, 0.5), 1, id="idefics3"),
        pytest.param("smolvlm", " [0.2, 0.3, 0.4, 0.5]", (0.2, 0.3, 0.4, 0.5), 1, id="smolvlm"),
        pytest.param("gemma3", "```\n[0.2, 0.3, 0.4, 0.5]\n```", (0.2, 0.3, 0.4, 0.5), 1, id="gemma3"),
    ],
)
def test_published_answer(name, text, box, count):
    parsed = parse(name, text)
    assert parsed.box == pytest.approx(box)
    assert parsed.count == count


@pytest.mark.parametrize(
    ("name", "question"),
    [
        ("demo", "Locate red car."),
        ("qwen2_vl", "Please provide the bounding box coordinate of the region this sentence describes: red car"),
        ("qwen2_5_vl", "Locate red car in this image and output the bbox coordinates in JSON format."),
        (
            "internvl",
            "Please provide the bounding box coordinate of the region this sentence describes: <ref>red car</ref>",
        ),
        ("paligemma", "detect red car"),
        ("florence2", "<CAPTION_TO_PHRASE_GROUNDING>red car"),
        ("kosmos2", "<grounding><phrase> red car</phrase>"),
        ("deepseek_vl2", "<|ref|>red car<|/ref|>."),
        ("gemma4", "detect red car, output only ```json"),
        ("qwen3_omni", "Locate the object: red car."),
        ("ovis2_5", "Find the <ref>red car</ref> in the image. Please provide the bounding box coordinates."),
        (
            "lfm2_vl",
            'Detect all instances of: red car. Response must be a JSON array: [{"label": ..., "bbox": [x1, y1, x2, y2]}'
            ", ...]. Coordinates are normalized to [0,1].",
        ),
        (
            "perception_lm",
            "Provide a bounding box of the region this sentence describes: 'red car'.\n"
            "Use the format [x1, y1, x2, y2].",
        ),
    ],
)
def test_published_question(name, question):
    assert DIALECTS[name].ask("red car") == question


@every_dialect
def test_question_holds_the_expression_as_it_stands(dialect):
    assert "the {odd} one" in dialect.ask("the {odd} one")


# --- no box ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("qwen2_5_vl", "", id="empty"),
        pytest.param("qwen2_5_vl", "There is no cat in this image.", id="prose"),
        pytest.param("qwen2_5_vl", '```json\n[\n\t{"bbox_2d": [322, 119, 483, 35', id="cut inside the last number"),
        pytest.param("fractions", "[0.1, 0.2, 0.3]", id="three numbers"),
        pytest.param("fractions", "[0.1, 0.2, 0.3, 0.4, 0.5]", id="five numbers"),
        pytest.param("fractions", "[nan, 0.2, inf, 0.4]", id="nan and inf"),
        pytest.param("fractions", "[0.1, 0.2, 1e9, 0.4]", id="exponent"),
        pytest.param("fractions", "[\u0660, \u0660, \u0661, \u0661]", id="digits of another script"),
        pytest.param("paligemma", "[256, 256, 768, 768] cat", id="list where tokens are written"),
        pytest.param("qwen2_vl", "[576, 12, 592, 42]", id="list where points are written"),
        pytest.param("glm4v", "<think>[[1,2,3,4]] or [[5,6,7,8]]", id="reasoning that never ends"),
    ],
)
def test_answer_without_a_box(name, text):
    assert parse(name, text) == Parsed(None, 0, ())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("qwen3_vl", "[600, 100, 500, 200]", id="inverted"),
        pytest.param("qwen3_vl", "[500, 100, 500, 200]", id="no width"),
        pytest.param("qwen3_vl", "[500, 100, 1200, 200]", id="pixels where thousandths are declared"),
        pytest.param("fractions", "[0, 0, 500, 700]", id="thousandths where fractions are declared"),
        pytest.param("fractions", "[-0.2, 0, 0.5, 0.7]", id="far outside"),
        pytest.param("demo", "[12,34,56,100]", id="more digits than the format has"),
        pytest.param("paligemma", "<loc0000><loc0000><loc1024><loc1023> cat", id="no such location token"),
        pytest.param("kosmos2", "<object><patch_index_0044><patch_index_1024></object>", id="no such patch"),
        pytest.param("llava", "[0.2, 0.0, 0.8, 0.1]", id="wholly in the padding"),
    ],
)
def test_first_box_that_is_none_is_counted_and_not_replaced(name, text):
    following = DIALECTS[name].write(Box(0.25, 0.25, 0.75, 0.75), original_size=ORIGINAL)
    parsed = parse(name, f"{text} or {following}")
    assert parsed.box is None
    assert parsed.count == 2
    assert parsed.coordinates


@pytest.mark.parametrize(
    ("name", "text", "other_scale"),
    [
        pytest.param("qwen3_vl", "[0.1, 0.2, 0.5, 0.7]", True, id="fractions for thousandths"),
        pytest.param("qwen2_5_vl", "[0.1, 0.2, 0.5, 0.7]", True, id="fractions for pixels"),
        pytest.param("qwen2_5_vl", "[100, 100, 980, 400]", True, id="thousandths for pixels"),
        pytest.param("gemma4", "[244, 256, 948, 1405]", True, id="pixels for thousandths"),
        pytest.param("lfm2_vl", "[120, 300, 580, 910]", True, id="thousandths for fractions"),
        pytest.param("ovis2_5", "(0.1,0.2),(0.5,20)", True, id="one number beyond the end"),
        pytest.param("paligemma", "<loc0000><loc0000><loc1024><loc1023> cat", True, id="no such location token"),
        pytest.param("qwen3_vl", "[600, 100, 500, 200]", False, id="inverted"),
        pytest.param("llava", "[0.2, 0.0, 0.8, 0.1]", False, id="wholly in the padding"),
        pytest.param("qwen3_vl", "[100, 100, 500, 200]", False, id="a box"),
        pytest.param("qwen3_vl", "There is none.", False, id="nothing"),
    ],
)
def test_another_scale_is_told_from_other_boxes_that_are_none(name, text, other_scale):
    parsed = parse(name, text)
    assert parsed.other_scale == other_scale
    assert not (parsed.other_scale and parsed.box)


def test_what_cannot_be_measured_is_in_no_other_scale():
    assert not parse("qwen2_5_vl", "[100, 100, 980, 400]", model_size=None).other_scale


@pytest.mark.parametrize("dialect", [one for one in DIALECTS.values() if not one.published], ids=lambda one: one.name)
def test_a_family_without_a_format_says_where_one_was_looked_for(dialect):
    assert dialect.name == "fractions" or "looked for in" in dialect.source


WHOLE = sorted(name for name, dialect in DIALECTS.items() if dialect.whole)


def test_which_formats_are_of_whole_numbers():
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "glm4v", "deepseek_vl2", "paligemma"} < set(WHOLE)
    assert {"qwen3_omni", "ernie4_5_vl", "gemma4", "perception_lm"} < set(WHOLE)
    assert not {"fractions", "llava", "shikra", "idefics3", "gemma3", "lfm2_vl", "ovis2_5"} & set(WHOLE)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "numbers",
    [
        ("0.12", "0.2", "0.5", "0.61"),
        ("0.0", "0.0", "1.0", "1.0"),
        ("0", "0.25", "1", "1"),
        ("-0.01", "0.2", "0.5", "1.02"),
    ],
    ids=" ".join,
)
def test_fractions_are_no_box_where_whole_numbers_are_declared(name, numbers):
    dialect = DIALECTS[name]
    before, after = dialect.number.split("{")[0], dialect.number.split("}")[1]
    written = dict(zip(dialect.fields, (f"{before}{number}{after}" for number in numbers), strict=False))
    parsed = parse(name, dialect.answer.format(box=dialect.box.format(**written), expression="it"))
    assert parsed.box is None
    assert parsed.count == 1
    assert len(parsed.coordinates) == len(dialect.fields)


@pytest.mark.parametrize("name", WHOLE)
def test_a_box_of_few_units_or_with_decimals_is_one(name):
    if "x1" not in DIALECTS[name].fields:
        return
    for corners in ((0, 0, 1, 1), (0.5, 1, 2, 1.5), (10.5, 20.25, 30, 40)):
        before, after = DIALECTS[name].number.split("{")[0], DIALECTS[name].number.split("}")[1]
        numbers = dict(zip(("x1", "y1", "x2", "y2"), (f"{before}{c}{after}" for c in corners), strict=True))
        assert parse(name, DIALECTS[name].box.format(**numbers)).box is not None


def test_declared_scale_is_never_guessed_from_the_numbers():
    assert parse("qwen3_vl", "[12, 30, 60, 90]").box == pytest.approx((0.012, 0.03, 0.06, 0.09))
    assert parse("qwen2_5_vl", "[100, 100, 600, 400]").box == pytest.approx(
        (100 / 644, 100 / 476, 600 / 644, 400 / 476)
    )


def test_overshoot_is_cut_at_the_edge():
    just = 1000 + 1000 * OVERSHOOT
    assert parse("qwen3_vl", f"[-20, 100, {just:.0f}, 200]").box == (0, 0.1, 1, 0.2)
    assert parse("qwen3_vl", f"[-20, 100, {just + 1:.0f}, 200]").box is None


@pytest.mark.parametrize("model_size", [None, (0, 476), (-1, -1)], ids=str)
def test_resized_pixels_mean_nothing_without_the_resized_size(model_size):
    parsed = parse("qwen2_5_vl", JSON, model_size=model_size)
    assert parsed.box is None
    assert parsed.count == 1
    with pytest.raises(ValueError, match="relative to the resized image"):
        DIALECTS["qwen2_5_vl"].write(Box(0, 0, 1, 1), model_size=model_size)


@every_dialect
def test_who_needs_the_model_size_says_so(dialect):
    text = dialect.write(Box(0.25, 0.25, 0.75, 0.75), original_size=ORIGINAL, model_size=RESIZED)
    without = dialect.parse(text, original_size=ORIGINAL, model_size=None)
    assert (without.box is None) == dialect.requires_model_size


# --- where the numbers are ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "numbers"),
    [
        pytest.param("qwen2_5_vl", JSON, ["322", "119", "483", "357"], id="digits"),
        pytest.param("fractions", "[ 0.1 ,-0.02, 0.6, 0.75 ]", ["0.1", "-0.02", "0.6", "0.75"], id="sign and point"),
        pytest.param(
            "paligemma",
            "<loc0256><loc0128><loc0768><loc0512> cat",
            ["<loc0256>", "<loc0128>", "<loc0768>", "<loc0512>"],
            id="whole tokens in text order",
        ),
        pytest.param("kosmos2", SNOWMAN, ["<patch_index_0044>", "<patch_index_0863>"], id="two patches"),
        pytest.param("glm4v", "<think>[[1,2,3,4]]</think>[[5,6,7,8]]", ["5", "6", "7", "8"], id="after reasoning"),
        pytest.param("qwen3_vl", QWEN3, ["513", "454", "570", "556"], id="of the first box"),
    ],
)
def test_coordinates_are_spans_of_the_text(name, text, numbers):
    assert [text[start:end] for start, end in parse(name, text).coordinates] == numbers


# --- any answer -----------------------------------------------------------------------------------

soup = st.text(alphabet='[](){}<>,;:.-_ \n\t"0123456789locpatch_index/think|e')
sizes = st.none() | st.tuples(st.integers(-1, 4000), st.integers(-1, 4000))
pieces = st.sampled_from(
    ["[", "]", "(", ")", ",", " ", "0.5", "12", "999999", "1000000", "-3", "<loc0512>", "<loc_7>", "<patch_index_0044>"]
)


@every_dialect
@settings(max_examples=100)
@given(text=st.text() | soup | st.lists(pieces, max_size=40).map("".join), original_size=sizes, model_size=sizes)
def test_parse_is_total(dialect, text, original_size, model_size):
    parsed = dialect.parse(text, original_size=original_size, model_size=model_size)
    assert (parsed.count > 0) == bool(parsed.coordinates)
    ends = [end for span in parsed.coordinates for end in span]
    assert ends == sorted(ends)
    if parsed.box is not None:
        assert parsed.count > 0
        x1, y1, x2, y2 = parsed.box
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "unit"),
    [
        ("", "["),
        ("", "[1,"),
        ("", "[1, 2, 3, "),
        ("", "(1,2),"),
        ("", "<loc0001>"),
        ("", "<patch_index_0001>"),
        ("", "<think>"),
        ("[", "9"),
        ("[0.", "9"),
        ("[1,", " "),
        ("<loc", "0"),
        ("(1,2)", "\n"),
    ],
)
def test_a_million_characters_are_no_trouble(start, unit):
    """Any super-linear search would take hours here, so finishing is the assertion."""
    text = start + unit * (1_000_000 // len(unit))
    shapes = {(dialect.box, dialect.number): dialect for dialect in DIALECTS.values()}
    for dialect in shapes.values():
        parsed = dialect.parse(text, original_size=ORIGINAL, model_size=RESIZED)
        assert parsed.count <= len(text) // 4


# --- there and back -------------------------------------------------------------------------------

STEP = {"demo": 1 / 100, "paligemma": 1 / 1024, "kosmos2": 1 / 32, "deepseek_vl2": 1 / 999, "shikra": 1 / 1000}
STEP |= dict.fromkeys(["qwen2_vl", "qwen3_vl", "internvl", "florence2", "glm4v"], 1 / 1000)


@every_dialect
@settings(max_examples=60)
@given(
    left=st.floats(0, 0.6),
    top=st.floats(0, 0.6),
    width=st.floats(0.2, 0.4),
    height=st.floats(0.2, 0.4),
    original=st.tuples(st.integers(50, 2000), st.integers(50, 2000)),
    resized=st.tuples(st.integers(28, 2000), st.integers(28, 2000)),
)
def test_written_box_is_read_back_within_the_rounding_of_its_format(
    dialect, left, top, width, height, original, resized
):
    box = Box(left, top, left + width, top + height)
    text = dialect.write(box, original_size=original, model_size=resized, expression="red car")
    parsed = dialect.parse(text, original_size=original, model_size=resized)
    visible = box
    steps = [STEP.get(dialect.name, 1 / 100)] * 2
    if dialect.frame is Frame.RESIZED:
        steps = [1 / side for side in resized]
    if dialect.frame is Frame.PADDED:
        steps = [step * max(original) / side for step, side in zip(steps, original, strict=True)]
    if dialect.frame is Frame.CROPPED:
        margins = [(side - min(original)) / 2 / side for side in original]
        visible = box._replace(
            x1=max(box.x1, margins[0]),
            y1=max(box.y1, margins[1]),
            x2=min(box.x2, 1 - margins[0]),
            y2=min(box.y2, 1 - margins[1]),
        )
        steps = [step + 1 / side for step, side in zip(steps, original, strict=True)]
        if min(visible.x2 - visible.x1 - 2 * steps[0], visible.y2 - visible.y1 - 2 * steps[1]) <= 0:
            return  # nothing of the object is left in the square that the model saw
    assert parsed.count == 1
    # A value is rounded by half a step, except at the far edge of a format that cannot write it.
    limits = [step * (1 if dialect.largest < float("inf") else 0.5) + 1e-9 for step in steps]
    for seen, meant, limit in zip(parsed.box, visible, limits * 2, strict=True):
        assert abs(seen - meant) <= limit


def test_demo_writes_two_digits_per_number():
    assert DIALECTS["demo"].write(Box(0.004, 0.05, 0.999, 1.0)) == "[00,05,99,99]"


# --- independent implementations ------------------------------------------------------------------


def test_kosmos_patches_agree_with_transformers():
    random = np.random.default_rng(0)
    for first, last in np.sort(random.integers(0, 1024, (500, 2)), axis=1).tolist():
        expected = patch_index_to_coordinate(first, last, 32)
        parsed = parse("kosmos2", f"<patch_index_{first:04d}><patch_index_{last:04d}>")
        assert parsed.box == (expected if expected[0] < expected[2] else None)
    for x1, y1, width, height in random.uniform(0.05, 0.45, (200, 4)).tolist():
        box = Box(x1, y1, x1 + width, y1 + height)
        first, last = coordinate_to_patch_index(box, 32)
        assert DIALECTS["kosmos2"].write(box) == f"<object><patch_index_{first:04d}><patch_index_{last:04d}></object>"


def test_florence_locations_agree_with_transformers():
    reference = Florence2PostProcessor(config=None, tokenizer=SimpleNamespace(all_special_tokens=[]))
    [first, _] = reference.parse_description_with_bboxes_from_text_and_spans(CAR, image_size=(100_000, 100_000))
    assert parse("florence2", CAR).box == pytest.approx(np.array(first["bbox"]) / 100_000)


def bright_box(image: torch.Tensor) -> list[float]:
    """Left, top, right, bottom of what is bright in a (channels, height, width) image, as fractions of it."""
    height, width = image.shape[1:]
    rows, columns = (image[0] > 0.5).nonzero().unbind(1)
    return [
        columns.min().item() / width,
        rows.min().item() / height,
        (columns.max().item() + 1) / width,
        (rows.max().item() + 1) / height,
    ]


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (333, 333)], ids=str)
@pytest.mark.parametrize(("name", "do_pad"), [("llava", True), ("llava_cropped", False)])
def test_square_frames_are_what_the_llava_processor_shows(name, do_pad, size):
    width, height = size
    mark = Box(0.4, 0.45, 0.6, 0.7)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, round(mark.y1 * height) : round(mark.y2 * height), round(mark.x1 * width) : round(mark.x2 * width)] = 255
    processor = LlavaImageProcessor(
        do_pad=do_pad, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_normalize=False
    )
    # Black padding, so that the mark is the only bright thing.
    processor.image_mean = [0.0, 0.0, 0.0]
    seen = bright_box(processor(image, return_tensors="pt")["pixel_values"][0])
    answer = "[" + ", ".join(f"{value:.4f}" for value in seen) + "]"
    assert parse(name, answer, original_size=size).box == pytest.approx(mark, abs=0.006)


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen2_vl", "qwen2_vl"),
        ("qwen2_5_vl", "qwen2_5_vl"),
        ("qwen3_vl_moe", "qwen3_vl"),
        ("qwen3_5", "qwen3_vl"),
        ("internvl", "internvl"),
        ("kosmos-2", "kosmos2"),
        ("smolvlm", "smolvlm"),
        ("perception_lm", "perception_lm"),
        ("gemma4", "gemma4"),
        ("lfm2_vl", "lfm2_vl"),
        ("qwen3_omni_moe", "qwen3_omni"),
        ("qwen2_5_omni", "qwen2_5_omni"),
        ("ernie4_5_moe_vl", "ernie4_5_vl"),
        ("ovis2_5", "ovis2_5"),
        ("a model of tomorrow", "fractions"),
    ],
)
def test_model_type_chooses(model_type, name):
    assert dialect_for(model_type) is DIALECTS[name]


def test_declared_dialect_wins():
    assert dialect_for("idefics3", "demo") is DIALECTS["demo"]


def test_unknown_declared_dialect_names_the_nearest():
    with pytest.raises(ValueError, match=re.escape("unknown dialect 'qwen25_vl', did you mean 'qwen2_5_vl'?")):
        dialect_for("idefics3", "qwen25_vl")


def test_model_types_are_those_of_transformers():
    """A misspelt type would silently get the generic dialect; five come with their checkpoints' own code."""
    declared = [model_type for dialect in DIALECTS.values() for model_type in dialect.model_types]
    assert len(declared) == len(set(declared))
    assert set(declared) - set(CONFIG_MAPPING_NAMES) == {
        *("shikra", "deepseek_vl_v2", "internvl_chat", "ernie4_5_moe_vl", "ovis2_5")
    }
