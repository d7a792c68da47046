import json
from functools import cache

import datasets
import numpy as np
import pytest
from helpers import photographs
from PIL import Image

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.protocol.response import Response, Token
from lmms_plugin.shifts.benchmark import FIFTEEN
from lmms_plugin.shifts.image.moving import MOVING, VISIBLE, movement
from lmms_plugin.shifts.severities import SEVERITIES
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.moved_documents import MovedDocs, scored_by_coordinate_mean
from lmms_plugin.tasks.grounding.moving_shifts import Moved
from lmms_plugin.tasks.registry import cells, task_files
from lmms_plugin.utils.copies import DatasetError

SIZE = (320, 240)
RECTANGLE = (60, 50, 180, 150)


def rows(*objects, size=SIZE):
    """One photograph: a white rectangle for every (box, expressions) on black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for (x0, y0, x1, y1), _ in objects:
        pixels[y0:y1, x0:x1] = 255
    made = [
        {
            "question_id": str(k),
            "image": Image.fromarray(pixels),
            "question": "",
            "answer": list(expressions),
            "segmentation": [],
            "bbox": [float(v) for v in (x0, y0, x1 - x0, y1 - y0)],
            "iscrowd": 0,
            "file_name": "photo.png",
        }
        for k, ((x0, y0, x1, y1), expressions) in enumerate(objects)
    ]
    return datasets.Dataset.from_list(made, features=photographs.FEATURES)


@cache
def one():
    return rows((RECTANGLE, ("white thing",)))


def shown(doc):
    name, severity = doc["moved_by"]
    return np.asarray(comprehension.doc_to_visual(doc, {"shift": name, "severity": severity})[0])


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", MOVING)
def test_the_thing_is_where_the_document_says(name, severity):
    # The middle is in every crop.
    box = (140, 105, 180, 135) if name == "crop" else RECTANGLE
    (doc,) = Moved(name, severity)(rows((box, ("white thing",))))
    image = shown(doc)
    assert image.shape == (doc["height"], doc["width"], 3)
    x, y, width, height = doc["bbox"]
    inside = image[round(y) : round(y + height), round(x) : round(x + width), 0] / 255
    white = np.where(image[..., 0] == 127, 0, image[..., 0] / 255)
    # All of its light, less what a blur or the corners of a turned box scatter.
    assert inside.mean() > 0.6
    assert white[round(y) : round(y + height), round(x) : round(x + width)].sum() > 0.85 * white.sum()
    assert Box(*doc["annotated"]) == pytest.approx(Box.from_xyxy(box, SIZE))


def test_a_mirror_changes_words_and_leaves_out_what_is_unclear():
    docs = Moved("horizontal_flip", 3)(rows((RECTANGLE, ("left thing", "right next to it", "white thing"))))
    assert [doc["expression"] for doc in docs] == ["right thing", "white thing"]
    assert [doc["original_expression"] for doc in docs] == ["left thing", "white thing"]
    assert [doc["expression_id"] for doc in docs] == ["0/0", "0/2"]
    assert {doc["shifted_rate"] for doc in docs} == {2 / 3}
    assert docs[0]["bbox"] == [140, 50, 120, 100]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_crop_leaves_out_targets_of_which_little_is_left(severity):
    boxes = [(x, y, x + 40, y + 40) for x in range(0, 280, 40) for y in range(0, 200, 40)]
    documents = rows(*((box, ("thing",)) for box in boxes))
    cut = movement(SIZE, "crop", severity, "photo")
    expected = [k for k, box in enumerate(boxes) if cut.visible(box) >= VISIBLE]
    docs = Moved("crop", severity)(documents)
    assert [doc["question_id"] for doc in docs] == [str(k) for k in expected]
    assert docs[0]["shifted_rate"] == len(expected) / len(boxes)
    assert len(expected) < len(boxes) or severity == 1
    for k, doc in zip(expected, docs, strict=True):
        x, y, width, height = doc["bbox"]
        assert (x, y, x + width, y + height) == pytest.approx(cut.box(boxes[k]))
        assert min(x, y) >= 0
        assert (x + width, y + height) <= cut.size


def test_nothing_left_is_said():
    with pytest.raises(
        DatasetError, match="expected expressions that allow quarter_turn at severity 1, got none among 1"
    ):
        Moved("quarter_turn", 1)(rows((RECTANGLE, ("left thing",))))


def test_a_picture_that_is_too_long_to_be_moved_names_itself():
    with pytest.raises(DatasetError, match=r"picture photo: upscale: expected sides of at most \d+ pixels .* 36000x"):
        Moved("upscale", 5)(rows(((10, 2, 60, 8), ("white thing",)), size=(12000, 10)))[0]


def test_a_moving_shift_of_unmoved_documents_is_refused():
    task = {"shift": "crop", "severity": 3}
    with pytest.raises(
        ValueError, match=r"crop at severity 3 moves boxes: .*set process_docs to .*moving_shifts.Moved"
    ):
        comprehension.doc_to_visual(ExpressionDocs(one())[0], task)
    (doc,) = Moved("rotation", 3)(one())
    with pytest.raises(ValueError, match=r"got moved_by: \['rotation', 3\]"):
        comprehension.doc_to_visual(doc, {"shift": "rotation", "severity": 4})


@pytest.mark.parametrize("task", [None, {}, {"shift": "fog", "severity": 3}])
def test_a_moved_box_is_not_shown_in_a_picture_that_is_not_moved(task):
    (doc,) = Moved("rotation", 3)(one())
    with pytest.raises(
        ValueError, match=r"box was moved by rotation at severity 3, its picture would not be: got shift"
    ):
        comprehension.doc_to_visual(doc, task)


def answer(box, doc):
    text = json.dumps({"bbox_2d": [round(1000 * side) for side in box]})
    tokens = tuple(Token(character, -0.1) for character in text)
    return Response(text, tokens, (doc["width"], doc["height"]), None, "qwen3_vl").encode()


def test_answers_are_scored_where_the_thing_is_and_where_it_was():
    (doc,) = Moved("horizontal_flip", 1)(one())
    target, annotated = comprehension.true_box(doc), Box(*doc["annotated"])
    assert target == pytest.approx(Box(1 - annotated.x2, annotated.y1, 1 - annotated.x1, annotated.y2))
    seen = scored_by_coordinate_mean(doc, [answer(target, doc)])
    remembered = scored_by_coordinate_mean(doc, [answer(annotated, doc)])
    told = [[output[name]["score"] for name in ("acc@0.5", "acc@0.5_unmoved")] for output in (seen, remembered)]
    assert told == [[1.0, 0.0], [0.0, 1.0]]
    assert seen["mean_iou"]["annotated"] == list(annotated)
    assert seen["mean_iou"]["target"] == list(target)
    assert scored_by_coordinate_mean(doc, ["nothing"])["acc@0.5_unmoved"]["score"] == 0.0


def test_the_model_is_told_the_size_of_what_it_sees():
    (doc,) = Moved("downscale", 2)(one())
    (turn,) = comprehension.doc_to_messages(doc, {"default": None} | {"shift": "downscale", "severity": 2})
    assert turn["grounding"]["original_size"] == [160, 120] == list(turn["content"][0]["url"].size)


def test_no_image_is_decoded_to_move_a_box(monkeypatch):
    documents = one()
    monkeypatch.setattr(Image.Image, "load", None)
    docs = MovedDocs(ExpressionDocs(documents), "perspective", 5)
    assert docs.remove_columns("image")[0]["bbox"]


# Tasks


@pytest.mark.parametrize("name", ["refcocoplus_c_testA", "shapes_c"])
def test_the_benchmark_is_fifteen_corruptions_at_five_severities(name):
    entries = cells.entries()
    members = entries[name].overrides["task"]
    places = [entries[member].overrides["metadata"] for member in members]
    assert {(place["shift"], place["severity"]) for place in places} == {(c, s) for c in FIFTEEN for s in SEVERITIES}
    assert len(members) == 75
    assert all("shifted" not in place for place in places)


@pytest.mark.parametrize("dataset", ["refcocoplus_geometry_testB", "shapes_geometry"])
def test_geometry_is_ten_shifts_by_themselves(dataset):
    entries = cells.entries()
    members = entries[dataset].overrides["task"]
    assert len(members) == 10
    for member in members:
        overrides = entries[member].overrides
        assert overrides["metadata"]["shifted"] == "geometry"
        assert overrides["process_docs"] == Moved(overrides["metadata"]["shift"], 3)
    assert {metric["metric"] for metric in task_files.sources()[dataset].configuration["aggregate_metric_list"]} >= {
        "acc@0.5",
        "acc@0.5_unmoved",
        "shifted_rate",
    }


def test_a_name_with_other_pixels_than_before_has_another_version():
    entries = cells.entries()
    versions = {
        s: entries[f"shapes_shift_{s}_3"].overrides["metadata"]["version"] for s in ("motion_blur", "zoom_blur")
    }
    assert versions == {"motion_blur": 2.0, "zoom_blur": 1.0}
