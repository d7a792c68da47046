"""VQA documents: schemas, parts, mixtures, and what is wrong said by name."""

from collections import Counter
from itertools import pairwise

import datasets
import numpy as np
import pytest
from helpers import vqa_copies

from lmms_plugin.tasks.vqa import questions
from lmms_plugin.tasks.vqa.datasets import SOURCES
from lmms_plugin.tasks.vqa.questions import MIXTURES, PARTS, Mixture, Parts, part_of
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture(scope="module")
def vqav2():
    return vqa_copies.rows("vqav2")


@pytest.fixture(scope="module", autouse=True)
def copies(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in vqa_copies.write(tmp_path_factory.mktemp("vqa")).items():
            patch.setenv(variable, folder)
        yield


@pytest.mark.parametrize("dataset", list(SOURCES))
def test_parts_divide_a_dataset_by_photograph(dataset):
    rows = SOURCES[dataset].load()
    parts = {part: Parts(dataset, (part,))(rows) for part in PARTS}
    identifiers = [doc["question_id"] for docs in parts.values() for doc in docs]
    assert len(identifiers) == len(set(identifiers)) == len(rows)
    images = [{doc["image_id"] for doc in docs} for docs in parts.values()]
    assert all(images)
    assert sum(map(len, images)) == len(set.union(*images))


def test_shares_of_the_parts():
    counts = Counter(part_of(f"coco/{number}") for number in range(20_000))
    for part, share in PARTS.items():
        assert counts[part] / 20_000 == pytest.approx(share, abs=0.01)


def test_the_part_of_a_photograph_is_written_in_stone():
    """Results of one release must be comparable with those of the next."""
    assert [part_of(f"coco/{number}") for number in (42, 73, 74, 133, 136)] == ["test", "test", "val", "val", "dev"]


def test_a_photograph_has_its_part_whatever_else_is_in_the_copy(vqav2):
    whole = {doc["question_id"]: doc["part"] for doc in Parts("vqav2", tuple(PARTS))(vqav2)}
    some = Parts("vqav2", tuple(PARTS))(vqav2.select(range(7, 30)))
    assert {doc["question_id"]: doc["part"] for doc in some}.items() <= whole.items()


def test_a_document_is_its_row(vqav2):
    docs = Parts("vqav2", tuple(PARTS))(vqav2)
    row, doc = vqav2[4], docs[4]
    assert doc["question"] == row["question"]
    assert doc["answers"] == [answer["answer"] for answer in row["answers"]]
    assert doc["question_id"] == f"vqav2/{row['question_id']}"
    assert doc["image_id"] == f"coco/{row['image_id']}" == docs.image_key(4)
    assert np.array_equal(np.asarray(doc["image"]), np.asarray(row["image"]))
    assert set(doc) == set(docs.features)
    assert "image" not in docs.remove_columns("image")[4]


def test_answers_of_vizwiz_are_plain_strings():
    doc = Parts("vizwiz")(SOURCES["vizwiz"].load())[0]
    assert len(doc["answers"]) == 10
    assert doc["image_id"].startswith("vizwiz/VizWiz_val_")


@pytest.mark.parametrize("name", list(MIXTURES))
def test_mixtures_hold_their_percentage(name, vqav2):
    other, percentage = name.split("_")
    docs = list(MIXTURES[name](vqav2).remove_columns("image"))
    tested = Counter(doc["dataset"] for doc in docs if doc["part"] == "test")
    assert tested[other] / tested.total() == pytest.approx(int(percentage) / 100, abs=0.02)
    held_out = [doc for doc in docs if doc["part"] == "val"]
    assert {doc["dataset"] for doc in held_out} == {"vqav2"}
    assert {doc["part"] for doc in docs} == {"val", "test"}
    assert len({doc["question_id"] for doc in docs}) == len(docs)


def test_a_mixture_with_less_of_vqav2_is_inside_of_one_with_more(vqav2):
    docs = (Mixture("advqa", ratio)(vqav2).remove_columns("image") for ratio in (1.0, 0.5))
    more, less = ({doc["question_id"] for doc in each if doc["dataset"] == "vqav2"} for each in docs)
    assert less < more


def test_questions_about_a_photograph_stand_together_in_a_mixture(vqav2):
    docs = MIXTURES["advqa_67"](vqav2)
    keys = [docs.image_key(i) for i in range(len(docs))]
    changes = sum(a != b for a, b in pairwise(keys))
    assert changes + 1 == len(set(keys))
    assert len({doc["dataset"] for doc in docs.remove_columns("image")[:12]}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.remove_columns("answers"), r"column 'answers' is missing: expected a list of structs"),
        (lambda rows: rows.rename_column("image_id", "id"), r"column 'image_id' is missing.*'id'"),
        (
            lambda rows: rows.remove_columns("answers").add_column("answers", [["no"] * 10] * len(rows)),
            r"column 'answers': expected a list of structs with the field 'answer', a string, got List",
        ),
        (
            lambda rows: rows.cast_column("question", datasets.Value("large_binary")),
            r"column 'question': expected a string, got",
        ),
        (
            lambda rows: rows.map(lambda row: {"answers": row["answers"][:1]}),
            r"row 0: column 'answers': expected the answers of several people, got .*without answers",
        ),
        (lambda rows: rows.map(lambda row: {"question": " "}), r"row 0: column 'question' is empty"),
    ],
    ids=["missing", "renamed", "other structure", "other type", "no answers", "no question"],
)
def test_what_is_wrong_with_a_dataset_is_named(change, message, vqav2):
    with pytest.raises(DatasetError, match=message):
        Parts("vqav2")(change(vqav2.select(range(3))))


def test_a_photograph_that_cannot_be_decoded_is_named(vqav2):
    rows = vqav2.cast_column("image", datasets.Image(decode=False)).select(range(60)).to_list()
    rows[50]["image"]["bytes"] = rows[50]["image"]["bytes"][:400]
    docs = Parts("vqav2", tuple(PARTS))(datasets.Dataset.from_list(rows, features=vqav2.features))
    with pytest.raises(DatasetError, match=r"row 50 \(vqav2/16002\): column 'image' cannot be decoded"):
        docs[50]


def test_missing_copies_say_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_ADVQA")
    with pytest.raises(DatasetError, match=r"AdVQA: no copy on the hub.*LMMS_PLUGIN_ADVQA"):
        SOURCES["advqa"].load()
    monkeypatch.setenv("LMMS_PLUGIN_ADVQA", "/nowhere")
    with pytest.raises(DatasetError, match="LMMS_PLUGIN_ADVQA=/nowhere: there is no such folder"):
        SOURCES["advqa"].load()
    (tmp_path / "train.parquet").touch()
    monkeypatch.setenv("LMMS_PLUGIN_ADVQA", str(tmp_path))
    with pytest.raises(DatasetError, match=r"expected validation\*.parquet, found train.parquet"):
        SOURCES["advqa"].load()


def test_the_hub_is_asked_for_the_split_with_answers_alone(monkeypatch):
    monkeypatch.delenv("LMMS_PLUGIN_VQAV2")
    path, arguments = SOURCES["vqav2"].load_arguments()
    assert path == "lmms-lab-encoder/VQAv2"
    assert arguments["data_files"] == {"validation": "data/validation-*"}
    with pytest.raises(DatasetError, match=r"cannot load lmms-lab-encoder/VQAv2: .*LMMS_PLUGIN_VQAV2"):
        SOURCES["vqav2"].load()


def test_a_copy_on_the_hub_gives_the_one_split_that_is_asked_for(tmp_path, vqav2):
    """A repository whose card tells of more splits, as those of the hub do."""
    (tmp_path / "data").mkdir()
    vqav2.select(range(6)).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    (tmp_path / "data" / "test-00000-of-00001.parquet").touch()
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - name: validation\n    num_bytes: 9\n    num_examples: 6\n"
        "  - name: test\n    num_bytes: 9\n    num_examples: 9\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: validation\n    path: data/validation-*\n  - split: test\n    path: data/test-*\n---\n"
    )
    source = questions.VqaDataset("elsewhere", "Elsewhere", str(tmp_path), "validation")
    assert len(source.load()) == 6


def test_functions_of_the_yaml():
    assert questions.vqav2 == Parts("vqav2", ("val", "test"))
    assert questions.vqav2_dev == Parts("vqav2", ("dev",))
    assert questions.advqa_33 == Mixture("advqa", 2.0)
