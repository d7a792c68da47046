"""The one opener of images: upright, on white, 8 bits, RGB, whole or an error that names the row."""

import io
import struct
import threading
import warnings
import zlib

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from helpers import photographs
from PIL import Image, ImageFile
from pyarrow import parquet

from lmms_plugin.protocol.boxes import Box
from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.protocol.prompts import PromptReader, RequestError
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.tasks.grounding.referring import ReferringSet
from lmms_plugin.tasks.retrieval import matching
from lmms_plugin.tasks.sources.conventions import Convention
from lmms_plugin.utils import images
from lmms_plugin.utils.copies import DatasetError

# How pixels that are stored with a tag were turned away from upright (EXIF 2.32, table 6).
AWAY = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture(size=(48, 32)):
    """Four quarters of different colours: no turn of it looks like another."""
    image = Image.new("RGB", size, (250, 10, 10))
    width, height = size
    image.paste((10, 250, 10), (width // 2, 0, width, height // 2))
    image.paste((10, 10, 250), (0, height // 2, width // 2, height))
    return image


def stored(image, tag, form="PNG", **options):
    """The file of an image whose pixels are turned away and whose EXIF says how to turn them back."""
    exif = Image.Exif()
    exif[0x0112] = tag
    buffer = io.BytesIO()
    turned = image if AWAY[tag] is None else image.transpose(AWAY[tag])
    turned.save(buffer, form, exif=exif, **options)
    return buffer.getvalue()


def encoded(data):
    return {"bytes": data, "path": None}


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunks(data):
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at : at + length + 12]
        at += length + 12


LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


class TestFrame:
    @pytest.mark.parametrize("tag", AWAY)
    @pytest.mark.parametrize("form", LOSSLESS)
    def test_every_orientation_comes_out_upright(self, form, tag):
        data = stored(picture(), tag, form, **LOSSLESS[form])
        assert np.array_equal(images.opened(encoded(data)), picture())
        assert images.header(encoded(data)) == ((48, 32), tag >= 5)

    @pytest.mark.parametrize("tag", AWAY)
    def test_jpeg(self, tag):
        data = stored(picture(), tag, "JPEG", quality=95, subsampling=0)
        shown = np.asarray(images.opened(encoded(data))).astype(int)
        assert shown.shape == (32, 48, 3)
        assert np.abs(shown - np.asarray(picture()).astype(int)).mean() < 10
        assert images.header(encoded(data)) == ((48, 32), tag >= 5)

    def test_agrees_with_what_datasets_decodes(self):
        for tag in AWAY:
            data = encoded(stored(picture(), tag, "JPEG"))
            assert np.array_equal(images.opened(data), datasets.Image().decode_example(data))

    def test_an_orientation_behind_the_pixels_of_a_png_counts(self):
        parts = dict(chunks(stored(picture(), 6)))
        late = b"\x89PNG\r\n\x1a\n" + b"".join(parts[name] for name in (b"IHDR", b"IDAT", b"eXIf", b"IEND"))
        assert images.header(encoded(late)) == ((48, 32), True)
        assert np.array_equal(images.opened(encoded(late)), picture())

    def test_a_header_costs_no_pixels(self, monkeypatch):
        files = [stored(picture(), 6, form) for form in ("PNG", "JPEG", "WEBP", "TIFF")]
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
        assert {images.header(encoded(data)).size for data in files} == {(48, 32)}

    def test_is_applied_once(self):
        once = images.opened(encoded(stored(picture(), 6)))
        assert images.to_rgb(once) is once
        assert images.to_rgb(once.convert("RGBA")).size == (48, 32)

    def test_documents_of_sideways_files_are_those_of_upright_ones(self):
        rows = photographs.rows("testA")
        upright = ExpressionDocs(in_files(rows, lambda image: stored(image, 1)))
        turned = ExpressionDocs(in_files(rows, lambda image: stored(image, 6)))
        for a, b in zip(upright, turned, strict=True):
            assert (a["width"], a["height"], a["bbox"]) == (b["width"], b["height"], b["bbox"])
            assert np.array_equal(comprehension.doc_to_visual(a)[0], comprehension.doc_to_visual(b)[0])

    def test_a_path_of_a_task_is_shown_upright(self, tmp_path):
        (tmp_path / "image.png").write_bytes(stored(picture(), 8))
        for source in (str(tmp_path / "image.png"), Image.open(tmp_path / "image.png")):
            assert np.array_equal(prompted(source), picture())


SIZED = ReferringSet(
    name="sized",
    title="Sized",
    hub_id=None,
    split="test",
    expression="expression",
    box="bbox",
    convention=Convention("xywh"),
    photograph="file_name",
    size=("width", "height"),
)


class TestStatedSize:
    def documents(self, tag, size):
        features = {"expression": datasets.Value("string"), "file_name": datasets.Value("string")}
        features |= {"bbox": datasets.List(datasets.Value("float64")), "image": datasets.Image()}
        features |= dict.fromkeys(("width", "height"), datasets.Value("int64"))
        row = {"expression": "the blue one", "file_name": "a.png", "bbox": [1.0, 17.0, 20.0, 10.0]}
        row |= {"image": encoded(stored(picture(), tag)), "width": size[0], "height": size[1]}
        return SIZED(datasets.Dataset.from_list([row], features=datasets.Features(features)))

    @pytest.mark.parametrize("tag", AWAY)
    def test_of_the_upright_image_is_right(self, tag):
        assert self.documents(tag, (48, 32))[0]["width"] == 48

    @pytest.mark.parametrize("tag", [5, 6, 7, 8])
    def test_of_the_stored_pixels_names_the_row_and_why(self, tag):
        with pytest.raises(DatasetError, match=r"row 0 \(a.png\): .*48 and 32, .*upright.*as stored.*orientation"):
            self.documents(tag, (32, 48))[0]

    def test_any_other_is_not_put_down_to_orientation(self):
        for tag, size in ((6, (40, 32)), (1, (32, 48))):
            with pytest.raises(DatasetError, match="expected 48 and 32") as failure:
                self.documents(tag, size)[0]
            assert "as stored" not in str(failure.value)


def ramp():
    return (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


def half_transparent():
    """Black everywhere; its left half is transparent, and so white on paper."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, 3:, 3] = 255
    return pixels


def on_paper():
    return np.where(half_transparent()[..., 3:] == 0, 255, 0).repeat(3, axis=2).astype(np.uint8)


def transparent_palette():
    indices = Image.fromarray((half_transparent()[..., 3] > 0).astype(np.uint8), "L").convert("P")
    indices.putpalette([0] * 768)
    return png(indices, transparency=0)


FILES = {
    "RGBA": (png(Image.fromarray(half_transparent())), on_paper()),
    "LA": (png(Image.fromarray(half_transparent()).convert("LA")), on_paper()),
    "palette with transparency": (transparent_palette(), on_paper()),
    "RGB with a transparent colour": (
        png(Image.fromarray(on_paper() // 255 * 77), transparency=(77, 77, 77)),
        on_paper(),
    ),
    "16-bit grey": (png(Image.fromarray(ramp())), np.repeat((ramp() >> 8).astype(np.uint8)[..., None], 3, 2)),
    "16-bit grey with a transparent level": (
        png(Image.fromarray(ramp()), transparency=0),
        np.repeat(np.where(ramp() == 0, 255, ramp() >> 8).astype(np.uint8)[..., None], 3, 2),
    ),
    "1-bit": (
        png(Image.fromarray(np.eye(8) > 0)),
        np.repeat((np.eye(8) * 255).astype(np.uint8)[..., None], 3, 2),
    ),
}


def prompted(source):
    reader = PromptReader(dialect_for("smolvlm"))
    content = [{"type": "image", "url": source}, {"type": "text", "text": "?"}]
    return reader.read([{"role": "user", "content": content}], "task toy, document 9").images[0]


def calibrated(data, tmp_path, name="train.parquet"):
    rows = [{"image": encoded(data), "caption": "a picture"}]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / name)
    return CalibrationSpec.parse(f"dataset:{tmp_path / name}:n=1").load_samples()[0].image


class TestPixels:
    @pytest.mark.parametrize("kind", FILES)
    def test_every_reader_sees_the_same(self, kind, tmp_path):
        data, expected = FILES[kind]
        image = Image.open(io.BytesIO(data))
        shown = [
            images.opened(encoded(data)),
            prompted(image),
            matching.doc_to_visual({"image": image})[0],
            comprehension.doc_to_visual({"image": image})[0],
            calibrated(data, tmp_path),
        ]
        for one in shown:
            assert one.mode == "RGB"
            assert np.array_equal(one, expected)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
    def test_every_mode_becomes_rgb(self, mode):
        grey = picture().convert("L")
        image = grey.convert("LA").convert(mode) if mode in ("La", "PA") else picture().convert(mode)
        assert (images.opened(image).mode, images.opened(image).size) == ("RGB", (48, 32))

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
    def test_sixteen_bits_of_any_byte_order(self, mode):
        order = ">u2" if mode == "I;16B" else "<u2"
        image = Image.frombytes(mode, (16, 16), ramp().astype(order).tobytes())
        assert np.array_equal(np.asarray(images.opened(image))[..., 0], ramp() >> 8)

    def test_the_first_frame_counts(self):
        buffer = io.BytesIO()
        other = Image.new("RGB", (48, 32), "white")
        picture().save(buffer, "PNG", save_all=True, append_images=[other, other])
        assert np.array_equal(images.opened(encoded(buffer.getvalue())), picture())

    def test_nothing_is_copied_where_nothing_changes(self):
        image = picture()
        assert images.opened(image) is image


def no_pixels():
    """A PNG that states a width of 0."""
    data = bytearray(png(Image.new("L", (1, 1))))
    data[16:20] = bytes(4)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def huge():
    """A PNG of few bytes whose header states more pixels than Pillow allows."""
    data = bytearray(png(Image.new("L", (1, 1))))
    data[16:24] = struct.pack(">II", 12000, 12000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def float_tiff():
    buffer = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(buffer, "TIFF")
    return buffer.getvalue()


DAMAGED = {
    "nothing": (None, "neither bytes nor a path"),
    "no bytes": (b"", "0 bytes"),
    "no image": (b"no image", r"it is no image of a format .*begins b.no image.$"),
    "half a file": (png(noise())[:4000], "truncated|broken"),
    "no width": (no_pixels(), "."),
    "too many pixels": (huge(), "12000x12000|limit"),
    "float": (float_tiff(), "no defined white"),
}


class TestDamage:
    @pytest.fixture(autouse=True)
    def lenient(self, monkeypatch):
        """As lmms-eval sets it."""
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield

    @pytest.mark.parametrize("kind", DAMAGED)
    def test_names_the_row_of_a_dataset(self, kind):
        data, reason = DAMAGED[kind]
        with pytest.raises(DatasetError, match=rf"row 0 \(.*_0.jpg\): column 'image' cannot be decoded: .*({reason})"):
            ExpressionDocs(documents_rows(data))[0]

    @pytest.mark.parametrize("kind", ["nothing", "no bytes"])
    def test_names_the_row_where_bytes_tell_photographs_apart(self, kind):
        unnamed = ReferringSet(**{**vars(SIZED), "photograph": None, "size": ()})
        rows = documents_rows(DAMAGED[kind][0]).rename_column("answer", "old").add_column("expression", ["it"])
        with pytest.raises(DatasetError, match=r"row 0: column 'image' cannot be decoded"):
            unnamed(rows).image_key(0)

    @pytest.mark.parametrize("kind", [kind for kind, (data, _) in DAMAGED.items() if data is not None])
    def test_names_the_row_of_a_calibration(self, kind, tmp_path):
        data, reason = DAMAGED[kind]
        with pytest.raises(ValueError, match=rf"calibration row 0 holds no readable image: .*({reason})"):
            calibrated(data, tmp_path)

    @pytest.mark.parametrize("kind", [kind for kind, (data, _) in DAMAGED.items() if data is not None])
    def test_names_the_document_of_a_task(self, kind, tmp_path):
        data, reason = DAMAGED[kind]
        (tmp_path / "image.png").write_bytes(data)
        with pytest.raises(RequestError, match=rf"task toy, document 9: its image cannot be decoded: .*(?s:{reason})"):
            prompted(str(tmp_path / "image.png"))

    def test_names_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(images.ImageError, match="nowhere"):
            images.opened(tmp_path / "nowhere.png")
        with pytest.raises(images.ImageError, match="nowhere"):
            images.opened({"bytes": None, "path": "nowhere.png"})

    def test_pillows_flag_is_put_back_also_after_many_threads(self):
        half = DAMAGED["half a file"][0]
        refused = []

        def read():
            for _ in range(20):
                try:
                    images.opened(encoded(half))
                except images.ImageError:
                    refused.append(half)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 160
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def calibrated_elsewhere(address, tmp_path):
    kept = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = {"image": pa.array([{"bytes": None, "path": address}], kept), "caption": ["a picture"]}
    parquet.write_table(pa.table(rows), tmp_path / "train.parquet")
    return CalibrationSpec.parse(f"dataset:{tmp_path / 'train.parquet'}:n=1").load_samples()[0].image


def test_what_lies_elsewhere_is_fetched_and_opened_like_any_other(tmp_path):
    fsspec.filesystem("memory").pipe("turned.jpg", stored(picture(), 6, "JPEG", quality=95, subsampling=0))
    shown = calibrated_elsewhere("memory://turned.jpg", tmp_path)
    assert shown.size == (48, 32)
    assert np.abs(np.asarray(shown, int) - np.asarray(picture(), int)).max() <= 8
    fsspec.filesystem("memory").pipe("half.png", png(noise())[:4000])
    for address, problem in (("half.png", "truncated|broken"), ("nowhere.png", "nowhere")):
        with pytest.raises(ValueError, match=rf"calibration row 0 holds no readable image: .*({problem})"):
            calibrated_elsewhere(f"memory://{address}", tmp_path)


def in_files(rows, write):
    undecoded = rows.cast_column("image", datasets.Image(decode=False))

    def changed(row):
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        return {"image": encoded(write(image))}

    return undecoded.map(changed).cast_column("image", datasets.Image())


def documents_rows(data):
    rows = photographs.rows("testA").select([0]).cast_column("image", datasets.Image(decode=False))
    return rows.map(lambda row: {"image": encoded(data), "bbox": [0.0, 0.0, 2.0, 2.0]}).cast_column(
        "image", datasets.Image()
    )


def test_boxes_are_meant_in_the_upright_frame():
    rows = photographs.rows("testA").select([5])
    turned = ExpressionDocs(in_files(rows, lambda image: stored(image, 6)))
    (doc,) = turned
    assert comprehension.true_box(doc) == Box.from_xywh(rows[0]["bbox"], photographs.photograph("flower.jpg").size)
