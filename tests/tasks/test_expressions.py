import datasets
import pytest
from helpers import photographs
from PIL import Image, ImageFile

from lmms_plugin.tasks.grounding import refcocoplus
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.referring import image_id
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture(scope="module")
def rows():
    return photographs.rows("testA")


def test_one_document_per_expression_in_row_order(rows):
    docs = ExpressionDocs(rows)
    written = [e for referent in photographs.REFERENTS["testA"] for e in referent.expressions]
    assert [doc["expression"] for doc in docs] == written
    assert len(docs) == len(written)
    assert len({doc["expression_id"] for doc in docs}) == len(written)


def test_document_carries_image_and_its_size(rows):
    doc = ExpressionDocs(rows)[0]
    assert isinstance(doc["image"], Image.Image)
    assert doc["image"].size == (doc["width"], doc["height"]) == (512, 512)


def test_without_the_image_column_no_pixel_is_decoded(rows, monkeypatch):
    docs = ExpressionDocs(rows).remove_columns("image")

    def decoded(self):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image.Image, "load", decoded)
    for doc in docs:
        assert "image" not in doc
        assert doc["width"] > 0
    assert "image" not in docs.features


def test_objects_on_one_photograph_share_its_id(rows):
    docs = ExpressionDocs(rows).remove_columns("image")
    on_astronaut = {doc["image_id"] for doc in docs if doc["file_name"].startswith("COCO_train2014_000000000000")}
    assert on_astronaut == {"COCO_train2014_000000000000"}


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("COCO_train2014_000000581857_16.jpg", "COCO_train2014_000000581857"),
        ("COCO_train2014_000000581857.jpg", "COCO_train2014_000000581857"),
        ("scene_12.png", "scene_12"),
    ],
)
def test_image_id(file_name, expected):
    assert image_id(file_name) == expected


def test_missing_column_is_named(rows):
    with pytest.raises(DatasetError, match="column 'bbox' is missing"):
        ExpressionDocs(rows.remove_columns("bbox"))


def test_wrong_type_is_named_with_what_came(rows):
    joined = rows.map(lambda row: {"answer": ", ".join(row["answer"])}, features=_with(answer=datasets.Value("string")))
    with pytest.raises(DatasetError, match=r"column 'answer': expected a list of strings, got .*string"):
        ExpressionDocs(joined)


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([0.0, 0.0, 10.0], "four numbers"),
        ([5.0, 5.0, 0.0, 10.0], "positive size"),
        ([float("nan"), 5.0, 10.0, 10.0], "got"),
        (None, "four numbers"),
    ],
    ids=["three numbers", "no width", "nan", "missing"],
)
def test_broken_box_names_row_and_column(rows, bbox, message):
    broken = rows.map(lambda row, i: {"bbox": bbox if i == 2 else row["bbox"]}, with_indices=True)
    with pytest.raises(DatasetError, match=rf"row 2 .*column 'bbox'.*{message}"):
        ExpressionDocs(broken)


def test_box_in_xyxy_order_is_noticed(rows):
    def to_xyxy(row):
        x, y, w, h = row["bbox"]
        return {"bbox": [x, y, x + w, y + h]}

    docs = ExpressionDocs(rows.map(to_xyxy))
    with pytest.raises(DatasetError, match=r"row 1 .*\[x, y, width, height\] in pixels inside the 512x512 image"):
        list(docs.remove_columns("image"))


@pytest.mark.parametrize("bbox", [[-2.0, 5.0, 1.5, 10.0], [5.0, 512.5, 10.0, 1.0], [512.0, 0.0, 2.0, 9.0]], ids=str)
def test_a_box_beside_the_image_is_noticed(rows, bbox):
    docs = ExpressionDocs(rows.map(lambda row, i: {"bbox": bbox if i == 1 else row["bbox"]}, with_indices=True))
    with pytest.raises(DatasetError, match=r"row 1 .*inside the 512x512 image"):
        list(docs.remove_columns("image"))


@pytest.mark.parametrize("answer", [[], ["  "], [None]], ids=["none", "blank", "null"])
def test_row_without_expression_is_an_error(rows, answer):
    with pytest.raises(DatasetError, match=r"row 0 .*'answer' holds no expression"):
        ExpressionDocs(rows.map(lambda row: {"answer": answer}, features=_with()))


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_empty_value_names_row_and_column(rows, column):
    encoded = rows.cast_column("image", datasets.Image(decode=False))
    emptied = encoded.map(lambda row, i: {column: None if i == 1 else row[column]}, with_indices=True)
    with pytest.raises(DatasetError, match=rf"row 1.*column '{column}' is empty"):
        list(ExpressionDocs(emptied.cast_column("image", datasets.Image())).remove_columns("image"))


def test_corrupt_image_names_the_row(rows, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    encoded = rows.cast_column("image", datasets.Image(decode=False))
    broken = encoded.map(lambda row: {"image": {"bytes": row["image"]["bytes"][:2000], "path": None}})
    docs = ExpressionDocs(broken.cast_column("image", datasets.Image()))
    with pytest.raises(DatasetError, match=r"row 0 \(COCO_train2014_000000000000_0.jpg\).*cannot be decoded"):
        docs[0]


class TestLocalCopy:
    def test_files_are_found_by_split(self, tmp_path, monkeypatch):
        monkeypatch.setenv(refcocoplus.VARIABLE, str(photographs.write(tmp_path / "data")))
        files = refcocoplus.local_files()
        assert set(files) == {"val", "testA", "testB"}
        assert all(len(paths) == 1 for paths in files.values())

    def test_missing_folder_says_how_to_go_on(self, tmp_path, monkeypatch):
        monkeypatch.setenv(refcocoplus.VARIABLE, str(tmp_path / "nowhere"))
        with pytest.raises(DatasetError, match=r"no such folder.*shapes_rec"):
            refcocoplus.local_files()

    def test_folder_without_splits_says_what_it_found(self, tmp_path, monkeypatch):
        (tmp_path / "train.parquet").touch()
        monkeypatch.setenv(refcocoplus.VARIABLE, str(tmp_path))
        with pytest.raises(DatasetError, match=r"expected files such as testA.parquet, found train.parquet"):
            refcocoplus.local_files()

    def test_variable_is_read_when_a_task_loads(self, tmp_path, monkeypatch):
        monkeypatch.delenv(refcocoplus.VARIABLE, raising=False)
        assert refcocoplus.DATASET.load_arguments() == ("lmms-lab-encoder/RefCOCOplus", {})
        monkeypatch.setenv(refcocoplus.VARIABLE, str(photographs.write(tmp_path)))
        path, arguments = refcocoplus.DATASET.load_arguments()
        assert path == "parquet"
        assert set(arguments["data_files"]) == {"val", "testA", "testB"}


def _with(**changed):
    return datasets.Features({**photographs.FEATURES, **changed})
