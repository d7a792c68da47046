"""RefCOCO+ with what reviewers found wrong."""

import json

import pytest
from helpers import natural_copies, photographs

from lmms_plugin.tasks.grounding import reviewed
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = natural_copies.write_reviewed(tmp_path / "reviewed")
    monkeypatch.setenv(reviewed.VARIABLE, str(folder))
    return folder


def documents():
    return reviewed.testA(photographs.rows("testA")).remove_columns("image")


def test_a_document_knows_whether_its_expression_is_without_an_error(folder):
    expected = {
        (entry["caption"], quality["caption_quality"])
        for entry, quality in zip(*natural_copies.reviewed("testA").values(), strict=True)
    }
    assert {(f"{doc['expression'].capitalize()}.", int(doc["clean"])) for doc in documents()} == expected


def test_a_review_is_of_the_same_words_on_the_same_box_of_the_same_photograph(folder):
    review = reviewed.Review(folder / "refcoco+_testA_reviewed.json")
    box = [151, 15, 150, 178]
    assert review.clean(0, box, "smiling face, of the Woman") is True
    assert review.clean(0, box, "short brown hair") is False
    assert review.clean(0, [151, 15, 150.4, 178], "smiling face of the woman") is True
    assert review.clean(0, [151, 15, 170, 178], "smiling face of the woman") is None
    assert review.clean(1, box, "smiling face of the woman") is None
    assert review.clean(0, box, "frowning face of the woman") is None


def test_metrics_are_taken_again_over_what_is_clean(folder):
    outputs = {}
    for doc in documents():
        x, y, w, h = doc["bbox"]
        fractions = [x / doc["width"], y / doc["height"], (x + w) / doc["width"], (y + h) / doc["height"]]
        answer = str(fractions) if doc["clean"] else "[0.0, 0.0, 0.01, 0.01]"
        outputs[doc["expression_id"]] = doc["clean"], reviewed.process_results(doc, [answer], "joint")
    for clean, output in outputs.values():
        assert output["acc@0.5"]["score"] == float(clean)
        assert ("acc@0.5_clean" in output) == clean
        assert output["clean_rate"]["score"] == float(clean)
        assert output["reviewed_rate"]["score"] == 1.0
        if clean:
            assert output["mean_iou_clean"]["score"] > 0.99


def change(path, do):
    content = json.loads(path.read_text())
    do(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("annotations"), r"expected an object with a list 'annotations', got \['images'\]"),
        (
            lambda c: c["annotations"][0].pop("caption_quality"),
            r"expected \['caption_quality'\] in every entry of 'anno",
        ),
        (
            lambda c: c["annotations"][0].update(caption_quality="good"),
            r"expected 'caption_quality' 0 or 1, got 'good'",
        ),
        (lambda c: c["images"][0].update(original_id="a"), r"reviewed.json: expected a whole number as 'original_id'"),
        (lambda c: c["annotations"][0].update(image_id=99), r"'annotations' refer to 99, which is no 'id' of"),
        (
            lambda c: c["images"][2].update(caption="something else"),
            r"expected a review of .* none of 1 of 11, e.g. 'black helmet' on COCO_train2014_\d+_1.jpg, box \[2",
        ),
    ],
    ids=["no annotations", "no quality", "another scale", "no number", "unknown image", "other words"],
)
def test_what_is_wrong_with_a_review_is_named(damage, message, folder):
    change(folder / "refcoco+_testA_reviewed.json", damage)
    with pytest.raises(DatasetError, match=message):
        documents()


def test_a_missing_file_says_what_was_found(folder, monkeypatch):
    (folder / "refcoco+_testA_reviewed.json").unlink()
    with pytest.raises(DatasetError, match=r"expected refcoco\+_testA_reviewed.json, found refcoco\+_testB_rev"):
        documents()
    monkeypatch.delenv(reviewed.VARIABLE)
    with pytest.raises(DatasetError, match=r"cannot load refcocos_annotation_reviewed/refcoco\+_testA.* of JierunChen"):
        documents()


def test_functions_of_the_yaml():
    assert reviewed.testB == reviewed.Reviewed("testB")
    assert reviewed.scored_by_coordinate_mean.keywords == {"estimator": "coordinate_mean"}
