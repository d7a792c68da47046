"""Scores of captions against lmms-eval's own way to the same libraries."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import caption_copies

from lmms_plugin.tasks.captions import captioning
from lmms_plugin.utils.copies import DatasetError

WRITTEN = ["a cat with green eyes", "", "a photo of a cup of coffee on a table", "two dogs"]


def rows():
    docs = captioning.SETS["val2014"](caption_copies.coco())
    return [captioning.process_results(docs[i], [text])["METEOR"] for i, text in enumerate(WRITTEN)]


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
@pytest.mark.slow
def test_scores_are_those_of_lmms_eval(tmp_path):
    from lmms_eval.tasks.coco_cap import utils

    theirs = [
        {"answer": row["captions"], "pred": row["caption"], "image_id": int(row["image"].split("_")[-1]), "id": 0}
        for row in rows()
    ]
    args = SimpleNamespace(output_path=str(tmp_path))
    assert captioning.cider(rows()) == pytest.approx(utils.coco_cider(theirs, args))
    scored = captioning.score(rows(), "CIDEr")
    assert scored.value == pytest.approx(np.mean(scored.each))
    assert captioning.cider_low(rows()) <= scored.value <= captioning.cider_high(rows())
    assert 0.0 < captioning.meteor(rows()) < 1.0
    assert 0.0 <= captioning.bleu_4(rows()) < captioning.rouge_l(rows()) < 1.0


def test_without_java_the_task_does_not_start(monkeypatch):
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    with pytest.raises(DatasetError, match=r"need Java .* no `java` is on the PATH"):
        captioning.SETS["val2014"](caption_copies.coco())


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
    monkeypatch.setattr(captioning.shutil, "which", lambda name: "/usr/bin/java")
    with pytest.raises(DatasetError, match=message):
        captioning.SETS["val2014"](damaged(caption_copies.coco()))
