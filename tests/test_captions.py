"""Scores of captions against lmms-eval's own way to the same libraries."""

import shutil
from types import SimpleNamespace

import caption_copies
import numpy as np
import pytest

from lmms_plugin.tasks import captions
from lmms_plugin.tasks.images import DatasetError

WRITTEN = ["a cat with green eyes", "", "a photo of a cup of coffee on a table", "two dogs"]


def rows():
    docs = captions.SETS["val2014"](caption_copies.coco())
    return [captions.process_results(docs[i], [text])["METEOR"] for i, text in enumerate(WRITTEN)]


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_scores_are_those_of_lmms_eval(tmp_path):
    from lmms_eval.tasks.coco_cap import utils

    theirs = [
        {"answer": row["captions"], "pred": row["caption"], "image_id": int(row["image"].split("_")[-1]), "id": 0}
        for row in rows()
    ]
    args = SimpleNamespace(output_path=str(tmp_path))
    assert captions.cider(rows()) == pytest.approx(utils.coco_cider(theirs, args))
    scored = captions.score(rows(), "CIDEr")
    assert scored.value == pytest.approx(np.mean(scored.each))
    assert captions.cider_low(rows()) <= scored.value <= captions.cider_high(rows())
    assert 0.0 < captions.meteor(rows()) < 1.0
    assert 0.0 <= captions.bleu_4(rows()) < captions.rouge_l(rows()) < 1.0


def test_without_java_the_task_does_not_start(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(DatasetError, match=r"need Java .* no `java` is on the PATH"):
        captions.SETS["val2014"](caption_copies.coco())


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda rows: rows.remove_columns("answer"), "column 'answer' is missing: expected a list of strings"),
        (lambda rows: rows.remove_columns("answer").rename_column("question", "answer"), "expected a list of strings"),
        (lambda rows: rows.map(lambda row: {"answer": []}), "holds no caption; is this a split without answers"),
    ],
    ids=["missing", "a string", "test split"],
)
def test_what_does_not_fit_is_named(damaged, message, monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(DatasetError, match=message):
        captions.SETS["val2014"](damaged(caption_copies.coco()))
