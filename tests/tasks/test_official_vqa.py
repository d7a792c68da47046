"""The challenge's files become a local copy that the tasks read."""

import json
import sys

import pytest
from helpers import vqa_copies
from helpers.environments import run

from lmms_plugin.tasks.sources import official_vqa
from lmms_plugin.tasks.vqa.datasets import SOURCES
from lmms_plugin.tasks.vqa.questions import PARTS, Parts
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture
def published(tmp_path):
    """AdVQA as it is published, of the rows of our small copy."""
    questions, annotations = [], []
    (tmp_path / "val2014").mkdir()
    for row in vqa_copies.rows("advqa", images=6):
        key = {"question_id": row["question_id"], "image_id": row["image_id"]}
        questions.append({**key, "question": row["question"]})
        annotations.append({**key, "answers": row["answers"], "answer_type": "other"})
        row["image"].save(tmp_path / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg", quality=95)
    (tmp_path / "questions.json").write_text(json.dumps({"info": {}, "questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"info": {}, "annotations": annotations[::-1]}))
    return tmp_path


def arguments(folder):
    return [folder / name for name in ("questions.json", "annotations.json", "val2014", "out/validation.parquet")]


def test_the_copy_is_what_was_published(published, monkeypatch):
    printed = run(
        [sys.executable, "-P", "-m", "lmms_plugin.tasks.sources.official_vqa", *map(str, arguments(published))],
        published,
    )
    assert "18 questions written" in printed
    monkeypatch.setenv("LMMS_PLUGIN_ADVQA", str(published / "out"))
    docs = Parts("advqa", tuple(PARTS))(SOURCES["advqa"].load())
    expected = Parts("advqa", tuple(PARTS))(vqa_copies.rows("advqa", images=6))
    assert list(docs.remove_columns("image")) == list(expected.remove_columns("image"))
    assert docs[0]["image"].size == expected[0]["image"].size


def forget_a_question(folder):
    change(folder / "questions.json", "questions", lambda entries: entries[1].pop("question"))


def change(path, key, do):
    content = json.loads(path.read_text())
    do(content[key])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f / "annotations.json", "annotations", list.pop), "expected an annotation of question 3000"),
        (
            lambda f: change(f / "questions.json", "questions", lambda q: q[0].update(image_id=7)),
            "is about photograph 7 in .* and about 3",
        ),
        (
            lambda f: change(f / "questions.json", "questions", lambda q: q[1].pop("question")),
            r"expected \['question'\]",
        ),
        (lambda f: (f / "questions.json").write_text("[]"), "expected an object with a list 'questions'"),
        (
            lambda f: (f / "val2014" / "COCO_val2014_000000000004.jpg").unlink(),
            "expected photograph 4 as COCO_val2014_000000000004.jpg or 000000000004.jpg",
        ),
    ],
    ids=["no annotation", "another photograph", "no question", "another form", "no photograph"],
)
def test_what_does_not_fit_is_named(damage, message, published):
    damage(published)
    with pytest.raises(DatasetError, match=message):
        official_vqa.write(*arguments(published))
