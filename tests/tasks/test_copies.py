"""A local copy that holds a split twice is refused, by its files or by its rows, whatever the dataset."""

import shutil

import datasets
import pytest
from helpers import caption_copies, natural_copies, photographs, vqa_copies

from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.tasks import copies
from lmms_plugin.tasks.captions import captioning
from lmms_plugin.tasks.grounding import refcocoplus
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.natural import SETS
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.vqa.questions import Parts
from lmms_plugin.utils.copies import DatasetError


def twice(rows):
    return datasets.concatenate_datasets([rows, rows])


class TestFiles:
    def load(self, folder):
        return refcocoplus.local_files(folder)["testA"]

    def put(self, folder, *names, rows=None):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (rows or photographs.rows("testA")).to_parquet(folder / name)

    @pytest.mark.parametrize(
        "names",
        [
            ("old/testA-00000-of-00001.parquet", "new/testA-00000-of-00001.parquet"),
            ("testA-00000-of-00001.parquet", "testA-00000-of-00002.parquet"),
            ("testA-00001-of-00002-abc.parquet", "testA-00001-of-00002-def.parquet"),
        ],
        ids=["two snapshots", "two numbers of shards", "two digests"],
    )
    def test_shards_of_two_sets_are_refused_though_their_rows_differ(self, tmp_path, names):
        self.put(tmp_path, names[0])
        self.put(tmp_path, names[1], rows=photographs.rows("testB"))
        with pytest.raises(DatasetError, match="expected the shards of one copy of a split, got two") as failure:
            self.load(tmp_path)
        assert all(name in str(failure.value) for name in names)

    def test_equal_files_are_refused_whatever_their_names(self, tmp_path):
        self.put(tmp_path, "testA.parquet", "testA_backup.parquet")
        with pytest.raises(DatasetError, match=r"testA.parquet and .*testA_backup.parquet are the same"):
            self.load(tmp_path)

    def test_shards_of_one_set_are_one_copy(self, tmp_path):
        rows = photographs.rows("testA")
        for number in range(3):
            self.put(tmp_path, f"testA-{number:05d}-of-00003.parquet", rows=rows.select([2 * number, 2 * number + 1]))
        self.put(tmp_path, "testB-00000-of-00001.parquet")
        found = self.load(tmp_path)
        assert len(found) == 3
        loaded = datasets.load_dataset("parquet", data_files={"testA": found}, split="testA", cache_dir=tmp_path / "c")
        assert len(ExpressionDocs(loaded)) == len(ExpressionDocs(rows))

    def test_every_source_looks_at_its_files_so(self, tmp_path, monkeypatch):
        origins = [SETS["ref_l4_test"], captioning.SETS["val2014"], matching.SETS["flickr30k"]]
        for origin in origins:
            names = (f"{snapshot}/{origin.split}-00000-of-00001.parquet" for snapshot in "ab")
            self.put(tmp_path / origin.name, *names)
            monkeypatch.setenv(origin.variable, str(tmp_path / origin.name))
            with pytest.raises(DatasetError, match="expected the shards of one copy of a split, got two"):
                origin.load_arguments()

    def test_calibration_does_too(self, tmp_path):
        self.put(tmp_path, "a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet")
        with pytest.raises(ValueError, match="expected the shards of one copy of a split, got two"):
            CalibrationSpec.parse(f"dataset:{tmp_path}:n=2").load_samples()


class TestRows:
    def test_refcocoplus(self):
        with pytest.raises(
            DatasetError,
            match=r"RefCOCO.*column 'question_id': expected every row once, got 'testA-0' in rows 0 and 6 "
            r"\(6 repeated of 12 rows\)",
        ):
            ExpressionDocs(twice(photographs.rows("testA")))

    def test_a_second_snapshot_with_other_words_is_one_too(self):
        rows = photographs.rows("testA")
        reworded = rows.map(lambda row: {"answer": [f"the {text}" for text in row["answer"]]})
        with pytest.raises(DatasetError, match="expected every row once"):
            ExpressionDocs(datasets.concatenate_datasets([rows, reworded]))

    @pytest.mark.parametrize("name", list(natural_copies.SAMPLES))
    def test_natural_sets_with_identifiers_or_without(self, name):
        rows = natural_copies.rows(name)
        source = next(source for source in SETS.values() if source.name == name)
        assert len(source(rows))
        with pytest.raises(DatasetError, match="expected every row once"):
            source(twice(rows))

    @pytest.mark.parametrize("name", ["screenspot", "screenspot_v2"])
    def test_the_same_words_and_box_on_another_photograph_are_another_row(self, name):
        rows = natural_copies.rows(name)
        changes = {"instruction": "open it", "bbox": [0.1, 0.1, 0.5, 0.5]}
        changed = rows.map(lambda row: changes, features=rows.features)
        names = [thing.photograph for thing in natural_copies.THINGS]
        once = changed.select(sorted({name: row for row, name in enumerate(names)}.values()))
        assert len(SETS[name](once)) == len(set(names))
        with pytest.raises(DatasetError, match=r"repeat photograph, expression and box"):
            SETS[name](changed)

    @pytest.mark.parametrize("name", ["vqav2", "advqa", "vizwiz"])
    def test_questions(self, name):
        with pytest.raises(DatasetError, match="column 'question_id': expected every row once"):
            Parts(name)(twice(vqa_copies.rows(name)))

    def test_captions(self, monkeypatch):
        monkeypatch.setattr(captioning.shutil, "which", lambda name: "/usr/bin/java")
        with pytest.raises(DatasetError, match="column 'question_id': expected every row once"):
            captioning.SETS["val2014"](twice(caption_copies.coco()))

    def test_retrieval(self):
        with pytest.raises(DatasetError, match="column 'filename': expected every row once"):
            matching.SETS["flickr30k"](twice(caption_copies.flickr30k()))


def test_the_demo_holds_every_row_once():
    from lmms_plugin.demo import DATA

    for split in ("test", "val"):
        assert ExpressionDocs(datasets.load_dataset(DATA, split=split))


def test_equal_size_is_not_enough(tmp_path):
    (tmp_path / "test-a.parquet").write_bytes(b"12345")
    (tmp_path / "test-b.parquet").write_bytes(b"12346")
    copies.expect_one_copy(sorted(tmp_path.iterdir()))
    shutil.copy(tmp_path / "test-a.parquet", tmp_path / "test-c.parquet")
    with pytest.raises(DatasetError, match="are the same"):
        copies.expect_one_copy(sorted(tmp_path.iterdir()))
