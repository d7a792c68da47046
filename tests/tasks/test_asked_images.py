"""`LMMS_PLUGIN_IMAGES`: grounding tasks ask about a part of the images, clean and shifted about the same."""

from collections import Counter

import datasets
import pytest

from lmms_plugin import demo
from lmms_plugin.study.file.task_images import documents_by_image
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture(scope="module")
def rows():
    return datasets.load_dataset(demo.DATA, split="test").select(range(60))


def asked(rows, monkeypatch, part):
    monkeypatch.setenv("LMMS_PLUGIN_IMAGES", part)
    docs = comprehension.process_docs(rows)
    return {docs.content(number)["expression_id"]: docs.image_key(number) for number in range(len(docs))}


def test_parts_hold_every_document_once_whatever_the_order_of_rows(rows, monkeypatch):
    docs = comprehension.process_docs(rows)
    everything = {docs.content(number)["expression_id"]: docs.image_key(number) for number in range(len(docs))}
    count = len(set(everything.values()))
    parts = [asked(rows, monkeypatch, part) for part in ("1:0:5", f"1:5:{count}")]
    assert {**parts[0], **parts[1]} == everything
    assert not set(parts[0].values()) & set(parts[1].values())
    assert len(set(parts[0].values())) == 5
    assert asked(rows.shuffle(seed=3), monkeypatch, "1:0:5") == parts[0]


@pytest.mark.parametrize(("part", "message"), [("1:5000:5001", "got none of them"), ("half", "seed:start:stop")])
def test_impossible_parts_are_refused(rows, monkeypatch, part, message):
    with pytest.raises(DatasetError, match=f"LMMS_PLUGIN_IMAGES={part}.*{message}"):
        asked(rows, monkeypatch, part)


def test_images_of_tasks_are_counted_as_the_tasks_index_them():
    docs = comprehension.process_docs(datasets.load_dataset(demo.DATA, split="test"))
    expected = Counter(docs.image_key(number) for number in range(len(docs)))
    assert documents_by_image(["shapes_rec", "shapes_shift_gaussian_noise_3"]) == expected


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["shapes_rec", "shapes_shift_synonyms_3"], "expected the same documents in every task, but shapes_sh"),
        (["reliable_vqav2"], "expected grounding tasks of this package, which read LMMS_PLUGIN_IMAGES"),
    ],
)
def test_tasks_without_common_parts_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        documents_by_image(tasks)
