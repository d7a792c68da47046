"""Strata by the number of distractors: the other objects of the target's category in COCO's annotations."""

import json

import datasets
import pytest
from helpers import natural_copies, photographs
from helpers.photographs import REFERENTS

from lmms_plugin.protocol.response import Response, Token
from lmms_plugin.tasks.grounding import comprehension, reviewed, strata
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.strata import Instances, Strata, number_in
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = natural_copies.write_instances(tmp_path / "coco")
    monkeypatch.setenv(strata.VARIABLE, str(folder))
    return folder


def documents(split="testA"):
    return ExpressionDocs(photographs.rows(split)).remove_columns("image")


def counted_by_hand(thing):
    if thing.photograph == "camera":
        return 3 if "photographer" in thing.expressions else 0
    return natural_copies.DISTRACTORS[thing.photograph]


def test_names_of_strata():
    assert strata.REFCOCO.names == ("distractors_0", "distractors_1", "distractors_2-3", "distractors_4+")
    assert [strata.REFCOCO.of(number) for number in range(6)] == [
        *strata.REFCOCO.names[:3],
        strata.REFCOCO.names[2],
        *[strata.REFCOCO.names[3]] * 2,
    ]
    assert strata.REF_ADV.names == ("distractors_2-3", "distractors_4-6", "distractors_7+")
    assert [strata.REF_ADV.of(number) for number in (None, 1, 3, 4, 7, 40)] == [
        *(None, None, "distractors_2-3", "distractors_4-6", "distractors_7+", "distractors_7+")
    ]
    assert Strata((5,)).names == ("distractors_5+",)


@pytest.mark.parametrize(("written", "number"), [(3, 3), ("3", 3), ([7, 8], 2), ("[7, 8]", 2), ("[]", 0), (0, 0)])
def test_a_number_or_a_list_counts(written, number):
    assert number_in(written) == number


@pytest.mark.parametrize("written", [-1, "many", "", None, True, 2.5, "2.5"])
def test_anything_else_is_no_number(written):
    with pytest.raises(ValueError, match="expected the number of distractors or a list of them"):
        number_in(written)


@pytest.mark.parametrize("split", ["testA", "testB", "val"])
def test_objects_of_the_same_category_are_counted(folder, split):
    docs = list(documents(split))
    expected = [counted_by_hand(thing) for thing in REFERENTS[split] for _ in thing.expressions]
    assert [doc["distractors"] for doc in docs] == expected
    assert [doc["stratum"] for doc in docs] == [strata.REFCOCO.of(number) for number in expected]


def test_every_stratum_is_among_them(folder):
    assert {doc["stratum"] for split in ("testA", "testB") for doc in documents(split)} == set(strata.REFCOCO.names)


def test_without_annotations_there_are_no_strata(monkeypatch):
    monkeypatch.delenv(strata.VARIABLE, raising=False)
    assert not any({"stratum", "distractors"} & set(doc) for doc in documents())


def test_photographs_that_are_not_cocos_have_none(folder):
    rows = photographs.rows("testA").map(lambda row: {"file_name": row["file_name"].replace("COCO_", "scene_")})
    assert not any("stratum" in doc for doc in ExpressionDocs(rows).remove_columns("image"))


def test_a_box_is_that_of_one_annotation(tmp_path):
    entries = [(1, 10, [0, 0, 50, 50]), (1, 10, [60, 0, 9, 9]), (1, 11, [70, 0, 9, 9]), (1, 12, [70.2, 0, 9, 9])]
    content = {"annotations": [dict(zip(("image_id", "category_id", "bbox"), one, strict=True)) for one in entries]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    objects = Instances(tmp_path / "instances.json")
    assert objects.distractors(1, [0.4, 0, 50, 49.6]) == 1
    assert objects.distractors(1, [2, 0, 50, 50]) is None
    assert objects.distractors(1, [70.1, 0, 9, 9]) is None, "of two categories"
    assert objects.distractors(2, [0, 0, 50, 50]) is None


def change(folder, do):
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    do(content)
    path.write_text(json.dumps(content))


def test_a_box_that_is_no_objects_is_in_no_stratum(folder):
    spoon = [322.0, 222.0, 80.0, 110.0]
    change(folder, lambda content: content["annotations"].remove(one_with(content, spoon)))
    rows = datasets.concatenate_datasets([photographs.rows("testA"), photographs.rows("testB")])
    docs = {doc["expression"]: doc for doc in ExpressionDocs(rows).remove_columns("image")}
    assert [name for name, doc in docs.items() if "stratum" not in doc] == ["silver spoon"]
    assert docs["white cup"]["distractors"] == 0


def test_many_boxes_that_are_no_objects_are_refused(folder):
    change(folder, lambda content: content["annotations"].pop(0))
    with pytest.raises(DatasetError, match=r"expected the objects of RefCOCO\+, but of 11 expressions 2 have a box"):
        documents()


def one_with(content, box):
    (found,) = [entry for entry in content["annotations"] if entry["bbox"] == box]
    return found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("annotations"), r"expected an object with a list 'annotations'"),
        (lambda content: content["annotations"][1].pop("category_id"), r"expected \['category_id'\] in every entry"),
        (lambda content: content["annotations"].append(7), r"expected objects in the list 'annotations', got 7"),
        (
            lambda content: content["annotations"][1].update(bbox=None),
            r"instances.json: expected four numbers as 'bbox'",
        ),
        (lambda content: content["annotations"][1].update(bbox=["1", 2, 3, 4]), r"expected four numbers as 'bbox'"),
        (lambda content: content["annotations"][1].update(image_id=[1]), r"expected a number or text as 'image_id'"),
    ],
    ids=["no list", "no category", "no object", "no box", "a box of text", "a list of images"],
)
def test_damaged_annotations_are_named(folder, damage, message):
    change(folder, damage)
    with pytest.raises(DatasetError, match=message):
        documents()


def test_a_folder_without_annotations_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(strata.VARIABLE, str(tmp_path))
    with pytest.raises(DatasetError, match=r"COCO_INSTANCES=.*expected instances.json or instances_train2014.json"):
        documents()


def test_scores_are_repeated_for_the_stratum(folder):
    doc = documents()[0]
    x, y, w, h = doc["bbox"]
    box = [x / doc["width"], y / doc["height"], (x + w) / doc["width"], (y + h) / doc["height"]]
    text = str(box)
    output = comprehension.process_results(doc, [Response(text, (Token(text, -0.1),)).encode()], "joint")
    assert output["mean_iou"]["stratum"] == doc["stratum"] == "distractors_2-3"
    assert (
        output["acc@0.5_distractors_2-3"]
        == output["acc@0.5"]
        == {"score": 1.0, "image": doc["image_id"], "id": "testA-0/0"}
    )
    assert output["ece_distractors_2-3"] == output["ece"]
    assert {name for name in output if "distractors" in name} == {"acc@0.5_distractors_2-3", "ece_distractors_2-3"}
    again = reviewed.process_results({**doc, "clean": True}, [text], "joint")
    assert again["acc@0.5_distractors_2-3"]["score"] == 1.0
    assert "ece_distractors_2-3" not in again, "without probabilities there is no calibration"


def test_every_stratum_has_its_metrics_in_the_tables():
    from lmms_plugin.registration import tasks_folder
    from lmms_plugin.tasks.registry import task_files

    for name, of in (("_grounding", (strata.REFCOCO, strata.REF_ADV)), ("_reviewed", (strata.REFCOCO,))):
        (file,) = tasks_folder_files(tasks_folder(), f"{name}.yaml")
        metrics = {entry["metric"] for entry in task_files.read(file)["metric_list"]}
        expected = {f"{metric}_{stratum}" for metric in comprehension.IN_STRATUM for one in of for stratum in one.names}
        assert {metric for metric in metrics if "distractors" in metric} == expected


def tasks_folder_files(folder, name):
    from pathlib import Path

    return list(Path(folder).rglob(name))
