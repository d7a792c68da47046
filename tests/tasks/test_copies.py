"""A local copy that holds a split twice or in part is refused, by its files or by its rows, whatever the dataset."""

import shutil

import datasets
import pytest
from helpers import caption_copies, natural_copies, photographs, vqa_copies
from loguru import logger

from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.tasks.captions import captioning
from lmms_plugin.tasks.grounding import refcocoplus, reviewed
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.natural import SETS
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.sources import annotations, published_files
from lmms_plugin.tasks.vqa import datasets as vqa_sources
from lmms_plugin.tasks.vqa.questions import Parts
from lmms_plugin.utils import copies
from lmms_plugin.utils.copies import DatasetError


def twice(rows):
    return datasets.concatenate_datasets([rows, rows])


def anew(rows, column):
    """The same rows under other identifiers."""
    made = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    for row in made:
        row[column] = row[column] + 10**6 if isinstance(row[column], int) else f"new-{row[column]}"
    return datasets.Dataset.from_list(made, features=rows.features)


ORIGINS = [
    *SETS.values(),
    *captioning.SETS.values(),
    matching.SETS["flickr30k"],
    *vqa_sources.SOURCES.values(),
]


def files_named(origin):
    """Load a source's local copy as its task does."""
    return origin.load_arguments()[1]["data_files"][origin.split]


class TestFiles:
    @pytest.fixture(autouse=True)
    def variable(self, tmp_path, monkeypatch):
        monkeypatch.setenv(refcocoplus.VARIABLE, str(tmp_path))

    def load(self):
        return refcocoplus.local_files()["testA"]

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
            self.load()
        assert all(name in str(failure.value) for name in names)

    def test_equal_files_are_refused_whatever_their_names(self, tmp_path):
        self.put(tmp_path, "testA.parquet", "testA_backup.parquet")
        with pytest.raises(DatasetError, match=r"testA.parquet and .*testA_backup.parquet are the same"):
            self.load()

    def test_shards_of_one_set_are_one_copy(self, tmp_path):
        rows = photographs.rows("testA")
        for number in range(3):
            self.put(tmp_path, f"testA-{number:05d}-of-00003.parquet", rows=rows.select([2 * number, 2 * number + 1]))
        self.put(tmp_path, "testB-00000-of-00001.parquet")
        found = self.load()
        assert len(found) == 3
        loaded = datasets.load_dataset("parquet", data_files={"testA": found}, split="testA", cache_dir=tmp_path / "c")
        assert len(ExpressionDocs(loaded)) == len(ExpressionDocs(rows))

    @pytest.mark.parametrize(
        ("names", "missing"),
        [
            (["testA-00000-of-00002.parquet"], "got 1: testA-00001-of-00002.parquet is missing"),
            (["testA-00001-of-00002.parquet"], "got 1: testA-00000-of-00002.parquet is missing"),
            (["testA_0_of_3.parquet"], "got 1: testA_1_of_3.parquet, testA_2_of_3.parquet are missing"),
            (["testA-2-of-3.parquet", "testA-3-of-3.parquet"], "got 2: testA-1-of-3.parquet is missing"),
            (["testA-00000-of-00002-0123456789abcdef.parquet"], r"got 1: testA-00001-of-00002-\*.parquet is missing"),
            (["testA-000-of-900.parquet"], r"of-900.parquet, testA-004-of-900.parquet, ... are missing"),
            (["testA-0-of-99999999999.parquet"], "testA-1-of-99999999999.parquet"),
        ],
    )
    def test_a_part_of_a_split_is_refused_and_what_is_missing_named(self, tmp_path, names, missing):
        for name in names:
            self.put(tmp_path, name, rows=photographs.rows("testA").select([len(list(tmp_path.iterdir()))]))
        with pytest.raises(DatasetError, match=rf"expected all \d+ shards of 'testA', .*{missing}.*; fetch") as failure:
            self.load()
        assert "\n" not in str(failure.value)

    def test_a_number_beyond_the_count_is_refused(self, tmp_path):
        for number in (0, 1, 5):
            self.put(tmp_path, f"testA-{number}-of-2.parquet", rows=photographs.rows("testA").select([number]))
        with pytest.raises(DatasetError, match=r"testA-5-of-2.parquet: expected a number below 2"):
            self.load()

    def test_shards_that_count_from_one_are_whole(self, tmp_path):
        for number in (1, 2):
            self.put(tmp_path, f"testA-{number}-of-2.parquet", rows=photographs.rows("testA").select([number]))
        assert len(self.load()) == 2

    @pytest.mark.parametrize("origin", ORIGINS, ids=lambda origin: f"{origin.name}-{origin.split}")
    def test_every_source_refuses_a_part(self, tmp_path, monkeypatch, origin):
        self.put(tmp_path, f"{origin.split}-00001-of-00002.parquet")
        monkeypatch.setenv(origin.variable, str(tmp_path))
        with pytest.raises(DatasetError, match=f"got 1: {origin.split}-00000-of-00002.parquet is missing"):
            files_named(origin)

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100], ids=["empty", "cut", "no parquet"])
    def test_a_damaged_file_is_named(self, tmp_path, content):
        (tmp_path / "testA.parquet").write_bytes(content)
        with pytest.raises(DatasetError, match=rf"{tmp_path}/testA.parquet: expected a whole parquet file: .*fetch it"):
            self.load()

    @pytest.mark.parametrize("origin", ORIGINS, ids=lambda origin: f"{origin.name}-{origin.split}")
    def test_every_source_says_that_a_file_is_no_folder(self, tmp_path, monkeypatch, origin):
        (tmp_path / "some.parquet").touch()
        monkeypatch.setenv(origin.variable, str(tmp_path / "some.parquet"))
        with pytest.raises(
            DatasetError, match=rf"^{origin.variable}=.*: expected a folder, got a file; .*{origin.split}\*.parquet"
        ):
            files_named(origin)

    @pytest.mark.parametrize("variable", [refcocoplus.VARIABLE, reviewed.VARIABLE])
    def test_refcocoplus_and_its_review_do_too(self, tmp_path, monkeypatch, variable):
        (tmp_path / "some.parquet").touch()
        read = {refcocoplus.VARIABLE: self.load, reviewed.VARIABLE: reviewed.Reviewed("testA").file}[variable]
        for value, told in (
            (str(tmp_path / "some.parquet"), "expected a folder, got a file"),
            ("~nosuchuser/x", "home"),
        ):
            monkeypatch.setenv(variable, value)
            with pytest.raises(DatasetError, match=f"^{variable}={value}: .*{told}"):
                read()

    def test_the_home_folder_is_meant_by_a_tilde(self, tmp_path, monkeypatch):
        self.put(tmp_path, "mine/testA.parquet")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv(refcocoplus.VARIABLE, "~/mine")
        assert self.load() == [str(tmp_path / "mine" / "testA.parquet")]

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

    def test_calibration_takes_a_part_since_it_draws_samples_anyway(self, tmp_path):
        self.put(tmp_path, "train-00003-of-00083.parquet")
        assert len(CalibrationSpec.parse(f"dataset:{tmp_path}:n=2").load_samples()) == 2


class TestRows:
    def test_the_same_rows_under_new_identifiers(self):
        rows = photographs.rows("testA")
        with pytest.raises(
            DatasetError,
            match=r"expected every row once, but of 12 rows 6 repeat photograph, expression and box of another, "
            r"e.g. rows 0 and 6; keep one copy",
        ):
            ExpressionDocs(datasets.concatenate_datasets([rows, anew(rows, "question_id")]))

    def test_the_same_rows_under_new_identifiers_and_names_of_photographs(self):
        rows = photographs.rows("testA")
        again = anew(anew(rows, "question_id"), "file_name")
        with pytest.raises(DatasetError, match="of 12 rows 6 repeat photograph, expression and box"):
            ExpressionDocs(datasets.concatenate_datasets([rows, again]))

    def test_the_same_words_and_box_on_other_bytes_are_another_row(self):
        made = photographs.rows("testA").cast_column("image", datasets.Image(decode=False)).to_list()
        again = []
        for number, row in enumerate(made):
            # Of the same size and the same in the middle.
            data = row["image"]["bytes"] + bytes([1])
            row["image"] = {"bytes": row["image"]["bytes"] + bytes([0]), "path": None}
            other = {"question_id": f"other-{number}", "file_name": f"other-{number}.jpg"}
            again.append({**row, "image": {"bytes": data, "path": None}, **other})
        rows = datasets.Dataset.from_list(made + again, features=photographs.FEATURES)
        assert len(ExpressionDocs(rows)) == 2 * len(ExpressionDocs(photographs.rows("testA")))

    def test_images_in_files_of_their_own_are_compared_too(self, tmp_path):
        made = photographs.rows("testA").cast_column("image", datasets.Image(decode=False)).to_list()
        for number, row in enumerate(made):
            (tmp_path / f"{number}.jpg").write_bytes(row["image"]["bytes"])
            row["image"] = {"bytes": None, "path": str(tmp_path / f"{number}.jpg")}
        rows = datasets.Dataset.from_list(made, features=photographs.FEATURES)
        with pytest.raises(DatasetError, match="of 12 rows 6 repeat photograph, expression and box"):
            ExpressionDocs(datasets.concatenate_datasets([rows, anew(anew(rows, "question_id"), "file_name")]))

    def test_a_few_are_a_warning(self):
        made = photographs.rows("testA").cast_column("image", datasets.Image(decode=False)).to_list()
        many = [
            {**row, "question_id": f"{copy}-{number}", "answer": [f"{text} {copy}" for text in row["answer"]]}
            for copy in range(4)
            for number, row in enumerate(made)
        ]
        again = {**many[3], "question_id": "again"}
        said = []
        sink = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
        ExpressionDocs(datasets.Dataset.from_list([*many, again], features=photographs.FEATURES))
        logger.remove(sink)
        (warning,) = said
        assert "of 25 rows 1 repeat photograph, expression and box of another, e.g. rows 3 and 24" in warning

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
        if source.identity:
            with pytest.raises(DatasetError, match=r"expected every row once, but .* repeat photograph"):
                source(datasets.concatenate_datasets([rows, anew(rows, source.identity)]))

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

    @pytest.mark.parametrize("name", ["vqav2", "advqa", "vizwiz"])
    def test_questions_under_new_identifiers(self, name):
        rows = vqa_copies.rows(name)
        both = datasets.concatenate_datasets([rows, anew(rows, "question_id")])
        with pytest.raises(
            DatasetError, match=f"of {len(both)} rows {len(rows)} repeat photograph, question and answers"
        ):
            Parts(name)(both)

    def test_captions_under_new_identifiers(self, monkeypatch):
        monkeypatch.setattr(captioning.shutil, "which", lambda name: "/usr/bin/java")
        both = datasets.concatenate_datasets([caption_copies.coco(), anew(caption_copies.coco(), "question_id")])
        with pytest.raises(DatasetError, match="of 12 rows 6 repeat photograph and captions of another"):
            captioning.SETS["val2014"](both)

    def test_retrieval_under_new_identifiers(self):
        both = datasets.concatenate_datasets([caption_copies.flickr30k(), anew(caption_copies.flickr30k(), "filename")])
        with pytest.raises(DatasetError, match="of 12 rows 6 repeat photograph and captions of another"):
            matching.SETS["flickr30k"](both)

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


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff", b""], ids=["cut", "nested", "bytes", "empty"])
def test_damaged_annotations_are_named(tmp_path, content):
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    for read in (annotations.read, lambda path: annotations.entries(path, "images", ()), reviewed.Review):
        with pytest.raises(DatasetError, match=r"expected JSON in .*instances\.json, which is damaged"):
            read(path)
    for form in ("refdrone", "vrsbench"):
        with pytest.raises(DatasetError, match=r"expected JSON in .*instances\.json, which is damaged"):
            next(published_files.rows(published_files.FORMS[form], path, tmp_path))
