"""Datasets that differ from RefCOCO+ by nature: their schemas, what is said of a broken one, their own metrics."""

import json
import re
from contextlib import contextmanager

import datasets
import pytest
from helpers import natural_copies
from helpers.natural_copies import THINGS, xyxy
from loguru import logger

from lmms_plugin.protocol.boxes import Box, iou
from lmms_plugin.protocol.response import Response, Token
from lmms_plugin.tasks.grounding import comprehension, natural, natural_scores, rejection
from lmms_plugin.tasks.grounding.natural import SETS
from lmms_plugin.tasks.sources import published_files
from lmms_plugin.tasks.sources.conventions import Convention
from lmms_plugin.utils.copies import DatasetError


@pytest.fixture(scope="module", autouse=True)
def copies(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in natural_copies.write(tmp_path_factory.mktemp("natural")).items():
            patch.setenv(variable, folder)
        yield


@contextmanager
def log(level):
    lines = []
    sink = logger.add(lambda message: lines.append(str(message)), level=level, format="{message}")
    yield lines
    logger.remove(sink)


def documents(name):
    source = SETS[name]
    return source(source.load()).remove_columns("image")


@pytest.mark.parametrize("name", SETS)
def test_a_document_has_the_drawn_box_in_pixels_of_its_image(name):
    drawn = [Box.from_xywh(thing.bbox, natural_copies.size(thing)) for thing in THINGS]
    whole = 0.75 if name == "vrsbench" else 0.98  # hundredths; integers
    docs = documents(name)
    assert len({doc["expression_id"] for doc in docs}) == len(docs) > 0
    for number, doc in enumerate(docs):
        assert doc["image_id"] == docs.image_key(number)
        if doc["bbox"] is not None:
            assert max(iou(comprehension.true_box(doc), box) for box in drawn) > whole, doc
            stated = any(e in doc["expression"] for thing in THINGS for e in thing.expressions)
            assert stated


@pytest.mark.parametrize("name", SETS)
def test_an_image_is_that_of_its_document(name):
    source = SETS[name]
    doc = source(source.load())[-1:][0]
    assert doc["image"].size == (doc["width"], doc["height"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ref_l4_test", 12),
        ("dior_rsvg", 5),
        ("refdrone", 4),
        ("refdrone_rejection", 8),
        ("groundingme", 9),
        ("refcoco_m", 22),
        ("refbench_pro", 10),
        ("refbench_pro_rejection", 12),
    ],
)
def test_how_many_documents_rows_make(name, expected):
    assert len(documents(name)) == expected


def test_several_targets_are_left_out_and_none_is_kept_for_rejection():
    expressions = {doc["expression"]: doc["bbox"] for doc in documents("refdrone_rejection")}
    for k, thing in enumerate(THINGS):
        if k % 3 == 1:
            assert thing.expressions[0] not in expressions
        else:
            assert expressions[thing.expressions[0]] == (list(thing.bbox) if k % 3 == 0 else None)
    assert all(doc["bbox"] for doc in documents("refdrone"))


def test_the_same_bytes_are_the_same_photograph():
    docs = documents("screenspot_v2")
    by_photograph = {}
    for doc, thing in zip(docs, THINGS, strict=True):
        assert by_photograph.setdefault(thing.photograph, doc["image_id"]) == doc["image_id"]
    assert len(set(by_photograph.values())) == len(by_photograph)


def test_tags_part_results():
    assert {doc["tags"]["subtask_l1"] for doc in documents("groundingme")} == {"Discriminative", "Spatial", "Limited"}
    assert {doc["tags"]["is_unique"] for doc in documents("vrsbench")} == {True, False}


def test_objects_in_structs_of_a_list_keep_their_sentences_boxes_and_tags():
    """RefCOCO-M has one row per photograph, and in it one struct per object with all its sentences."""
    docs = {doc["expression"]: doc for doc in documents("refcoco_m")}
    for k, thing in enumerate(THINGS):
        for expression in thing.expressions:
            doc = docs[expression]
            assert doc["bbox"] == list(thing.bbox)
            assert doc["tags"] == {"category": "person" if k % 2 else "thing", "supercategory": "all"}
            assert "samples" not in doc
    assert len({doc["image_id"] for doc in docs.values()}) == len({thing.photograph for thing in THINGS})


def test_ref_adv_is_parted_by_its_distractors():
    docs = documents("ref_adv")
    assert [doc["distractors"] for doc in docs] == [2 + 3 * (k % 3) for k in range(len(THINGS))]
    names = ("distractors_2-3", "distractors_4-6", "distractors_7+")
    assert [doc["stratum"] for doc in docs] == [names[k % 3] for k in range(len(THINGS))]


def changed(change):
    return lambda rows: rows.map(change)


def in_pixels(row):
    return {"bbox": [value * 512 for value in row["bbox"]]}


def in_fractions(row):
    return {"bbox": [value / 512 for value in row["bbox"]]}


def three_numbers(row):
    return {"bbox": row["bbox"][:3]}


def as_xywh(row):
    x1, y1, x2, y2 = row["solution"]
    return {"solution": [x1, y1, x2 - x1, y2 - y1]}


def as_xyxy(row):
    x, y, w, h = row["bbox"]
    return {"bbox": [x, y, x + w, y + h]}


def without(column):
    return lambda rows: rows.remove_columns(column)


def renamed(old, new):
    return lambda rows: rows.rename_column(old, new)


def with_value(**values):
    return changed(lambda row: values)


def twice_the_captions(row):
    return {"objects": {**row["objects"], "captions": row["objects"]["captions"] * 2}}


def a_box_less(row):
    return {"objects": {**row["objects"], "bbox": [None, *row["objects"]["bbox"][1:]]}}


def struct_without(name):
    return lambda row: {"samples": [{key: value for key, value in s.items() if key != name} for s in row["samples"]]}


def as_corners(row):
    boxes = [(s, s["bbox"]) for s in row["samples"]]
    return {"samples": [{**s, "bbox": [x, y, x + w + 400, y + h + 400]} for s, (x, y, w, h) in boxes]}


def no_sentence(row):
    return {"samples": [{**row["samples"][0], "sentences": []}, *row["samples"][1:]]}


BROKEN = [
    ("ref_l4_test", renamed("caption", "text"), r"column 'caption' is missing: expected a string; .*'text'"),
    ("ref_l4_test", changed(as_xyxy), r"row \d+ \(\w+\.jpg\): column 'bbox': expected \[x, y, width, height\] in pix"),
    ("ref_l4_test", with_value(width=7), r"column 'width' and 'height': expected 512 and 512.* got 7 and 512"),
    ("ref_adv", changed(as_xywh), r"row \d+ .*column 'solution': expected .*\[x1, y1, x2, y2\] in pixels of positive"),
    ("ref_adv", without("solution"), r"column 'solution' is missing: expected four numbers"),
    ("ref_adv", without("distractors"), r"column 'distractors' is missing: expected a number of distractors"),
    ("ref_adv", changed(lambda row: {"distractors": -1}), r"row 0 .*column 'distractors': expected the number of .*-1"),
    ("refcoco_m", without("samples"), r"column 'samples.sentences' is missing: expected a list of strings"),
    ("refcoco_m", changed(struct_without("bbox")), r"column 'samples.bbox'"),
    (
        "refcoco_m",
        changed(as_corners),
        r"row \d+ \(COCO_\w+.jpg\): column 'samples.bbox': expected \[x, y, width, height\]",
    ),
    ("refcoco_m", changed(no_sentence), r"row 0 .*column 'samples.sentences' holds an object without any"),
    ("refbench_pro", without("task_type"), r"column 'task_type' is missing"),
    ("refbench_pro", with_value(bbox=[]), r"row 0 \(astronaut.jpg\): column 'bbox': expected a list of four numbers"),
    ("groundingme", without("subtask_l1"), r"column 'subtask_l1' is missing"),
    ("groundingme", changed(in_fractions), r"column 'bbox': expected .* in pixels.*would fit as .* in 0 to 1 of"),
    ("refdrone", renamed("bboxes", "bbox"), r"column 'bboxes' is missing: expected a list of boxes"),
    ("screenspot", changed(in_pixels), r"column 'bbox': expected \[x1.* in 0 to 1 of .*it would fit as .*in pixels"),
    ("screenspot_v2", changed(in_pixels), r"row 0: column 'bbox': expected .* 0 to 1 of the image inside the 512x512"),
    ("screenspot_pro", with_value(img_size="[5, 5]"), r"column 'img_size': expected 512 and 512.*got \[5, 5\]"),
    ("screenspot_pro", with_value(bbox="top left"), r"column 'bbox': expected a list of four .*'top left'"),
    (
        "dior_rsvg",
        changed(twice_the_captions),
        r"row 0 \(astr.*boxes in column 'objects.bbox' .*captions', got 2 and 4",
    ),
    ("dior_rsvg", changed(a_box_less), r"row 0 .*column 'objects.bbox': expected a list of four numbers"),
    ("dior_rsvg", renamed("objects", "items"), r"column 'objects.captions' is missing.*'items'"),
    ("vrsbench", with_value(ground_truth="{<10><20><30>}"), r"column 'ground_truth': expected .*0 to 100"),
    ("vrsbench", with_value(ground_truth="{<100><200><900><950>}"), r"'ground_truth': .*would fit as .*1000"),
    ("refcocog_test", without("answer"), r"column 'answer' is missing: expected a list of strings"),
    ("refcoco_testB", changed(three_numbers), r"column 'bbox': expected a list of four numbers"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN, ids=[f"{row[0]}-{k}" for k, row in enumerate(BROKEN)])
def test_a_broken_schema_is_named_with_what_was_found(name, change, message):
    source = SETS[name]
    with pytest.raises(DatasetError, match=message):
        list(source(change(source.load())).remove_columns("image"))


class TestConvention:
    @pytest.mark.parametrize(
        ("convention", "written"),
        [
            (Convention("xywh"), [20, 10, 40, 60]),
            (Convention("xyxy"), "[20, 10, 60, 70]"),
            (Convention("xyxy", 1.0), [0.1, 0.1, 0.3, 0.7]),
            (Convention("xyxy", 100.0), "{<10><10><30><70>}"),
            (Convention("xywh", 1000.0), (100, 100, 200, 600)),
        ],
        ids=str,
    )
    def test_all_write_the_same_box(self, convention, written):
        assert convention.pixels(convention.numbers(written), (200, 100)) == pytest.approx([20, 10, 40, 60])

    @pytest.mark.parametrize(
        "written", [None, [1, 2, 3], [1, 2, 3, None], "1,2,3,4 or so", [0, 0, float("nan"), 1], []]
    )
    def test_anything_else_is_no_box(self, written):
        with pytest.raises(ValueError, match="expected a list of four numbers"):
            Convention("xywh").numbers(written)

    def test_flat_boxes_only_where_rounding_makes_them(self):
        with pytest.raises(ValueError, match="positive size"):
            Convention("xyxy", 100.0).numbers([3, 4, 3, 9])
        assert Convention("xyxy", 100.0, flat=True).numbers([3, 4, 3, 9]) == [3, 4, 3, 9]
        with pytest.raises(ValueError, match="positive size"):
            Convention("xyxy", 100.0, flat=True).numbers([3, 4, 2, 9])

    def test_a_finer_scale_shows_in_many_boxes(self):
        """Hundredths read as thousandths stay in a corner, which no single box proves."""
        boxes = [([k, k, k + 9.0, k + 9.0], (640, 480)) for k in range(0, 90, 3)]
        Convention("xyxy", 100.0).reach(boxes)
        with pytest.raises(ValueError, match=r"of 30 boxes none reaches beyond 0\.096 of its image"):
            Convention("xyxy", 1000.0).reach(boxes)
        Convention("xyxy", 1000.0).reach(boxes[:5])

    @pytest.mark.parametrize(("order", "scale"), [("yxyx", None), ("xyxy", 0.0)])
    def test_impossible_declarations(self, order, scale):
        with pytest.raises(ValueError, match="expected"):
            Convention(order, scale)


def answer(box, logprob=-0.1):
    text = "[" + ",".join(f"{round(100 * v):02d}" for v in box) + "]"
    return Response(text, tuple(Token(c, logprob) for c in text), (512, 512), None, "demo").encode()


def test_a_click_on_the_middle_hits_without_overlap_enough():
    doc = documents("screenspot")[0]
    x1, y1, x2, y2 = comprehension.true_box(doc)
    around = (max(x1 - 0.2, 0), max(y1 - 0.02, 0), min(x2 + 0.2, 0.99), min(y2 + 0.3, 0.99))
    output = natural_scores.clicked(doc, [answer(around)], "joint")
    assert output["click_acc"]["score"] == 1.0
    assert output["acc@0.5"]["score"] == 0.0
    assert output["mean_iou"]["tags"] == {"data_type": "icon", "data_source": "macos"}
    assert natural_scores.clicked(doc, [answer((0.8, 0.8, 0.9, 0.9))], "joint")["click_acc"]["score"] == 0.0
    assert natural_scores.clicked(doc, ["nowhere"], "joint")["click_acc"]["score"] == 0.0


def test_the_edge_of_a_box_belongs_to_it():
    box = Box(0.1, 0.2, 0.5, 0.6)
    assert natural_scores.holds(box, (0.1, 0.6))
    assert not natural_scores.holds(box, (0.1, 0.61))
    assert natural_scores.centre(box) == pytest.approx((0.3, 0.4))


@pytest.mark.parametrize("width", [640, 1000, 1079])
def test_a_click_on_the_edge_in_pixels_hits(width):
    """The middle of the answer is the right edge of the true box, whatever rounding makes of the two fractions."""
    for edge in range(2, width // 2):
        for reach in (1, edge - 1):
            answered = Box((edge - reach) / width, 0.2, (edge + reach) / width, 0.4)
            true = Box(0.0, 0.0, edge / width, 1.0)
            assert natural_scores.holds(true, natural_scores.centre(answered))
            short = Box(0.0, 0.0, (edge - 0.5) / width, 1.0)
            assert not natural_scores.holds(short, natural_scores.centre(answered))


def test_rejection_ranks_documents_by_whether_they_have_a_target():
    docs = list(documents("groundingme_rejection"))
    outputs = []
    for k, doc in enumerate(docs):
        sure = -0.01 * (1 + k) if doc["bbox"] else -1.0 - k
        outputs.append(natural_scores.judged(doc, [answer((0.1, 0.1, 0.4, 0.4), sure)], "joint"))
    judged = [output["rejection_auroc"] for output in outputs]
    upside_down = [each._replace(confidence=1 - each.confidence) for each in judged]
    assert rejection.auroc(judged) == 1.0
    assert rejection.auroc(upside_down) == 0.0
    sides = [("box_rate_true" in output, "box_rate_no_target" in output) for output in outputs]
    assert sides == [(doc["bbox"] is not None, doc["bbox"] is None) for doc in docs]
    assert not any({"confidence_falls", "shifted_rate", "acc@0.5"} & set(output) for output in outputs)
    assert [natural_scores.target(doc) == "none" for doc in docs] == [doc["bbox"] is None for doc in docs]


def test_the_hub_is_asked_for_one_split(monkeypatch):
    for source in SETS.values():
        monkeypatch.delenv(source.variable, raising=False)
    path, arguments = natural.dior_rsvg.load_arguments()
    assert path == "danielz01/DIOR-RSVG"
    assert arguments["data_files"] == {"test": "data/test-*"}
    assert natural.groundingme.load_arguments() == ("lirang04/GroundingME", {})
    with pytest.raises(
        DatasetError, match=r"Ref-L4: no copy on the hub.*LMMS_PLUGIN_REF_L4.*caption.*published_files ref"
    ):
        natural.ref_l4_val.load_arguments()


class TestPublished:
    @pytest.fixture
    def files(self, tmp_path):
        return natural_copies.published(tmp_path)

    @pytest.mark.parametrize("name", published_files.FORMS)
    def test_a_copy_has_every_expression_and_the_bytes_of_its_image(self, name, files, tmp_path):
        out = tmp_path / "out" / "test.parquet"
        assert published_files.write(name, files / name, files / "images", out) == len(THINGS)
        rows = datasets.Dataset.from_parquet(str(out)).cast_column("image", datasets.Image(decode=False))
        for row, thing in zip(rows, THINGS, strict=True):
            assert row["image"]["bytes"] == (files / "images" / natural_copies.file_name(thing)).read_bytes()

    @pytest.mark.parametrize(
        ("name", "damage", "message"),
        [
            ("refdrone", lambda content: content.pop("images"), r"expected an object with a list 'images'"),
            ("refdrone", lambda content: content["annotations"][2].pop("bbox"), r"expected \['bbox'\] in every entry"),
            ("refdrone", lambda content: content["images"].pop(0), r"'annotations' refer to \[0\], which are no 'id'"),
            ("vrsbench", lambda content: content[3].pop("ground_truth"), r"expected \['ground_truth'\] in every entry"),
            ("vrsbench", lambda content: content[0].update(question="[refer] <p>a</p>"), r"expected a bare expression"),
            ("vrsbench", lambda content: content[1].update(image_id="gone.png"), r"expected the image 'gone.png'"),
        ],
        ids=["no images", "no box", "unknown image", "no truth", "a prompt", "no image"],
    )
    def test_what_is_wrong_with_published_files_is_named(self, name, damage, message, files, tmp_path):
        content = json.loads((files / name).read_text())
        damage(content)
        (files / name).write_text(json.dumps(content))
        with pytest.raises(DatasetError, match=message):
            published_files.write(name, files / name, files / "images", tmp_path / "out.parquet")

    def test_expressions_whose_box_is_kept_back_are_left_out_and_counted(self, files, tmp_path):
        rows = [row | ({"bbox": []} if k % 2 else {}) for k, row in enumerate(natural_copies.refbench_pro())]
        (files / "refbench_pro").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        with log("WARNING") as lines:
            written = published_files.write(
                "refbench_pro", files / "refbench_pro", files / "images", tmp_path / "test.parquet"
            )
        left = [row for row in rows if row["bbox"] or row["task_type"] == "reject"]
        assert written == len(left) == 8
        assert "4 expressions left out, their boxes are not published" in lines[0]
        kept = datasets.Dataset.from_parquet(str(tmp_path / "test.parquet"))
        assert [row["expression"] for row in kept] == [row["expression"] for row in left]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"bbox": "abc"}, r"^row 1: bbox: expected list<.*double.*>, got abc$"),
            ({"expression": 5}, r"^row 1: expression: expected string, got 5$"),
            ({"width": 10**30}, r"^row 1: width: expected int64, got 10+$"),
        ],
        ids=["text", "number", "huge"],
    )
    def test_a_field_of_another_type_is_named_and_a_copy_that_is_there_stays(self, changed, message, files, tmp_path):
        out = tmp_path / "out.parquet"
        arguments = files / "refbench_pro", files / "images", out
        published_files.write("refbench_pro", *arguments)
        before = out.read_bytes()
        rows = [row | (changed if k == 1 else {}) for k, row in enumerate(natural_copies.refbench_pro())]
        (files / "refbench_pro").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        with pytest.raises(DatasetError, match=message):
            published_files.write("refbench_pro", *arguments)
        assert out.read_bytes() == before
        assert sorted(path.name for path in tmp_path.glob("*.parquet*")) == ["out.parquet"]

    def test_the_command_ends_in_one_line(self, files, tmp_path, monkeypatch, capsys):
        (files / "refbench_pro").write_text('{"expression": "a"')
        given = ["refbench_pro", files / "refbench_pro", files / "images", tmp_path / "out.parquet"]
        monkeypatch.setattr("sys.argv", ["published_files", *map(str, given)])
        with pytest.raises(SystemExit) as ended:
            published_files.main()
        assert ended.value.code == 2
        assert re.search(r"error: .*refbench_pro:1.*fetch it again\n$", capsys.readouterr().err)
        assert not (tmp_path / "out.parquet").exists()

    def test_a_damaged_line_is_named(self, files, tmp_path):
        (files / "refbench_pro").write_text('{"expression": "a"')
        with pytest.raises(DatasetError, match=r"refbench_pro:1.*fetch it again"):
            published_files.write("refbench_pro", files / "refbench_pro", files / "images", tmp_path / "out.parquet")


def test_vrsbench_of_whole_hundredths_keeps_what_rounding_flattened():
    source = SETS["vrsbench"]
    flat = source.load().map(lambda row: {"ground_truth": "{<10><20><10><30>}"})
    doc = source(flat).remove_columns("image")[0]
    assert natural_scores.scored(doc, [answer((0.1, 0.2, 0.11, 0.3))], "joint")["mean_iou"]["score"] == 0.0
    assert xyxy(THINGS[0]) != doc["bbox"]
