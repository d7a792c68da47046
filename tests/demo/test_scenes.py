"""The embedded demo: scenes, expressions, data files, checkpoint and the script that trained it."""

import io
import json
import re
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo_training import dataset
from demo_training.architecture import build_model
from demo_training.dataset import SCENES
from demo_training.evaluate import Question, about_split, conversation, generate, overlaps
from lmms_plugin.demo import CHECKPOINT, DATA
from lmms_plugin.demo.dataset import FEATURES, rows
from lmms_plugin.demo.scenes import RGB, SIDE, draw, scene
from lmms_plugin.demo.wording import COLOURS, FILLS, SHAPES, SIZES, Attributes, expressions, identifying
from lmms_plugin.protocol.boxes import Box, iou

MANY = [(split, index) for split in ("train", "val", "test") for index in range(70)]

# What each word says, written down here independently of the generator's own tables.
_MEANING = {
    **{c: ("colour", c) for c in COLOURS},
    **dict.fromkeys(("small", "little", "tiny"), ("size", "small")),
    **dict.fromkeys(("large", "big"), ("size", "large")),
    **dict.fromkeys(("plain", "solid", "without"), ("fill", "plain")),
    **dict.fromkeys(("hollow", "outlined", "empty", "with"), ("fill", "hollow")),
    **dict.fromkeys(("circle", "disc", "round"), ("shape", "circle")),
    **dict.fromkeys(("triangle", "triangular"), ("shape", "triangle")),
    **dict.fromkeys(("cross", "cross-shaped", "plus"), ("shape", "cross")),
    "square": ("shape", "square"),
}
_FILLER = {"the", "a", "one", "thing", "object", "shape", "sign", "hole", "that", "is", "and"}


def _understood(expression: str) -> dict[str, str]:
    words = expression.split()
    assert set(words) <= set(_MEANING) | _FILLER, expression
    return dict(_MEANING[w] for w in words if w in _MEANING)


def _matches(said: dict[str, str], attributes: Attributes) -> bool:
    return all(getattr(attributes, name) == value for name, value in said.items())


class TestScenes:
    @pytest.mark.parametrize(("split", "index"), MANY)
    def test_every_expression_means_one_object(self, split, index):
        drawn = scene(split, index)
        for item in drawn.objects:
            assert 1 <= len(set(item.expressions)) == len(item.expressions) <= 3
            for expression in item.expressions:
                said = _understood(expression)
                assert said, f"{expression!r} says nothing"
                assert [o for o in drawn.objects if _matches(said, o.attributes)] == [item], expression

    @pytest.mark.parametrize(("split", "index"), MANY)
    def test_boxes_are_tight_inside_and_apart(self, split, index):
        drawn = scene(split, index)
        assert 1 <= len(drawn.objects) <= 4
        for k, item in enumerate(drawn.objects):
            y, x = np.nonzero(drawn.owner == k)
            assert item.box == (x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min())
            assert min(item.box[:2]) >= 0
            assert max(item.box[0] + item.box[2], item.box[1] + item.box[3]) <= SIDE
        boxes = [Box.from_xywh(o.box, (SIDE, SIDE)) for o in drawn.objects]
        assert all(iou(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])

    @pytest.mark.parametrize(("split", "index"), MANY[::7])
    def test_silhouettes_are_painted_in_their_colour_and_hollow_ones_show_the_ground(self, split, index):
        drawn = scene(split, index)
        for k, item in enumerate(drawn.objects):
            off = drawn.image[drawn.owner == k].astype(int) - RGB[item.attributes.colour]
            # Fourteen levels of tint and six of grain is all that may lie between paint and palette.
            painted = (np.abs(off) <= 14 + 6).all(axis=1).mean()
            assert painted == 1 if item.attributes.fill == "plain" else 0.25 < painted < 0.95

    def test_all_attributes_and_numbers_of_objects_occur(self):
        drawn = [scene("train", i) for i in range(300)]
        seen = zip(*(o.attributes for s in drawn for o in s.objects), strict=True)
        assert [set(values) for values in seen] == [set(SHAPES), set(COLOURS), set(SIZES), set(FILLS)]
        assert {len(s.objects) for s in drawn} == {1, 2, 3, 4}

    def test_at_most_as_many_objects_as_asked_for(self):
        assert {len(scene("train", i, max_objects=2).objects) for i in range(40)} == {1, 2}

    def test_sizes_are_told_apart_and_within_reach_of_the_grid(self):
        longer = {"small": [], "large": []}
        for i in range(300):
            for item in scene("train", i).objects:
                longer[item.attributes.size].append(max(item.box[2:]) / SIDE)
        assert max(longer["small"]) < min(longer["large"])
        assert min(longer["small"]) > 0.13
        assert max(longer["large"]) < 0.5

    def test_same_seed_same_scene(self):
        one, other = scene("test", 5), scene("test", 5)
        assert np.array_equal(one.image, other.image)
        assert one.objects == other.objects

    def test_splits_seeds_and_indices_give_different_scenes(self):
        keys = [("train", 0, 0), ("val", 0, 0), ("test", 0, 0), ("train", 1, 0), ("train", 0, 1)]
        images = {scene(split, index, seed=seed).image.tobytes() for split, index, seed in keys}
        assert len(images) == len(keys)

    def test_a_global_random_state_has_no_say(self):
        np.random.seed(1)  # noqa: NPY002  the global state is what is under test
        cv2.setRNGSeed(1)
        one = draw(np.random.default_rng(3))
        np.random.seed(2)  # noqa: NPY002
        cv2.setRNGSeed(2)
        assert np.array_equal(one.image, draw(np.random.default_rng(3)).image)

    def test_unknown_split(self):
        with pytest.raises(KeyError):
            scene("testA", 0)


class TestWording:
    RED_CIRCLE = Attributes("circle", "red", "small", "plain")

    def test_identifying_subsets_by_hand(self):
        others = [Attributes("circle", "blue", "small", "plain"), Attributes("square", "red", "small", "plain")]
        found = {frozenset(s) for s in identifying(self.RED_CIRCLE, others)}
        expected = [{"shape", "colour"}, {"shape", "colour", "size"}, {"shape", "colour", "fill"}]
        assert found == {frozenset(s) for s in [*expected, {"shape", "colour", "size", "fill"}]}

    def test_alone_any_attribute_identifies(self):
        assert len(identifying(self.RED_CIRCLE, [])) == 15

    def test_a_twin_cannot_be_told_apart(self):
        with pytest.raises(ValueError, match="one object like"):
            expressions(self.RED_CIRCLE, [self.RED_CIRCLE], np.random.default_rng(0))

    def test_no_location_words(self):
        said = {w for i in range(200) for o in scene("train", i).objects for e in o.expressions for w in e.split()}
        places = "left right top bottom middle center upper lower above below near far corner front behind next"
        assert not said & set(places.split())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return datasets.load_dataset(DATA, cache_dir=str(tmp_path_factory.mktemp("datasets")))


class TestData:
    def test_schema_is_refcocoplus(self, loaded):
        assert set(loaded) == {"test", "val"}
        expected = {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.List(datasets.Value("string")),
            "segmentation": datasets.List(datasets.Value("float32")),
            "bbox": datasets.List(datasets.Value("float32")),
            "iscrowd": datasets.Value("int8"),
            "file_name": datasets.Value("string"),
        }
        for split in loaded.values():
            assert dict(split.features) == expected
            assert list(split.features) == list(FEATURES)

    @pytest.mark.parametrize("split", SCENES)
    def test_files_are_what_the_generator_writes(self, split):
        stored = pq.read_table(next(Path(DATA).glob(f"{split}-*.parquet"))).to_pylist()
        fresh = list(rows(split, SCENES[split]))
        pictures = [row.pop("image") for row in stored], [row.pop("image") for row in fresh]
        for held, made in zip(stored, fresh, strict=True):
            assert held["bbox"] == made["bbox"]
            assert held == made
        for held, made in list(zip(*pictures, strict=True))[::25]:
            a, b = (np.asarray(Image.open(io.BytesIO(p["bytes"]))).astype(int) for p in (held, made))
            # Builds of libjpeg may round differently; a level or two is no other picture.
            assert np.abs(a - b).max() <= 2

    def test_other_scenes_are_not_mistaken_for_cached_ones(self, tmp_path, monkeypatch):
        seen = []
        for count in (3, 5):
            monkeypatch.setattr(dataset, "SCENES", {"test": count, "val": 2})
            dataset.write(tmp_path / "data")
            loaded = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
            assert set(loaded) == {"test", "val"}
            seen.append(len(set(loaded["test"]["file_name"])))
        assert seen == [3, 5]
        assert len(list((tmp_path / "data").glob("*.parquet"))) == 2

    def test_enough_and_small(self, loaded):
        assert len(set(loaded["test"]["file_name"])) == SCENES["test"] >= 100
        # Enough for an interval of a few points, few enough for nineteen passes of four models on a laptop.
        assert 400 <= sum(map(len, loaded["test"]["answer"])) <= 600
        assert sum(f.stat().st_size for f in Path(DATA).iterdir()) < 1_500_000

    def test_outlines_span_their_boxes(self, loaded):
        for row in loaded["val"].select_columns(["segmentation", "bbox"]):
            x, y = row["segmentation"][::2], row["segmentation"][1::2]
            assert [min(x), min(y), max(x) + 1 - min(x), max(y) + 1 - min(y)] == row["bbox"]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="auto").eval()


class TestCheckpoint:
    def test_accuracy_on_held_out_scenes(self, model, processor):
        questions = about_split("test")[::4]
        found = np.array(overlaps(model, processor, questions, batch_size=57))
        assert len(found) >= 100
        assert (found >= 0.5).mean() >= 0.85

    def test_every_answer_is_one_box_and_nothing_else(self, model, processor):
        for text in generate(model, processor, about_split("val")[::15]):
            assert re.fullmatch(r"\[\d\d,\d\d,\d\d,\d\d\]", text)

    def test_at_most_eight_megabytes(self):
        assert sum(f.stat().st_size for f in Path(CHECKPOINT).iterdir()) <= 8_000_000

    def test_declares_its_dialect(self):
        config = json.loads((Path(CHECKPOINT) / "config.json").read_text())
        assert config["grounding_dialect"] == "demo"

    def test_only_safetensors(self):
        assert {f.name for f in Path(CHECKPOINT).iterdir()} >= {"model.safetensors", "config.json", "README.md"}
        assert not [f for f in Path(CHECKPOINT).iterdir() if f.suffix in {".bin", ".pt", ".pth", ".py", ".pkl"}]

    def test_hidden_sizes_are_multiples_of_128(self, model):
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert linear
        assert all(m.in_features % 128 == 0 for m in linear)

    def test_padding_does_not_change_an_answer(self, model, processor):
        said = ["red one", "the little hollow object that nobody has described before, whatever it may be", "cross"]
        image = Image.fromarray(scene("test", 3).image)
        questions = [Question(image, expression, Box(0, 0, 1, 1)) for expression in said]
        alone = [generate(model, processor, [question])[0] for question in questions]
        assert generate(model, processor, questions) == alone

    def test_any_size_and_mode_of_image_takes_one_block_of_tokens(self, processor):
        lengths = set()
        for image in (Image.new("RGB", (112, 112)), Image.new("L", (640, 48)), Image.new("RGBA", (33, 500))):
            text = processor.apply_chat_template(conversation("cross"), add_generation_prompt=True)
            lengths.add(processor(text=[text], images=[[image]], return_tensors="pt")["input_ids"].shape[1])
        assert len(lengths) == 1

    def test_digits_are_tokens_and_any_text_survives(self, processor):
        tokenizer = processor.tokenizer
        assert tokenizer.tokenize("[12,34,56,78]") == list("[12,34,56,78]")
        for text in ("Locate teh smal rde circel.", "größer ☃ 你好", "\t\n 007"):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_weights_moved_away_from_their_start(self, model, processor):
        start = build_model(processor.tokenizer, seed=0)
        for (name, trained), fresh in zip(model.named_parameters(), start.parameters(), strict=True):
            assert not torch.equal(trained, fresh), name


def test_package_data_names_no_machine():
    text = "".join(f.read_text() for f in Path(CHECKPOINT).glob("*.json"))
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
