"""Write a grounding benchmark in its published files as parquet in the columns that its task reads.

    python -m lmms_plugin.tasks.sources.published_files ref_l4 ref-l4-test.parquet IMAGES OUT/test.parquet
    python -m lmms_plugin.tasks.sources.published_files refdrone RefDrone_test_mdetr.json IMAGES OUT/test.parquet
    python -m lmms_plugin.tasks.sources.published_files vrsbench VRSBench_EVAL_referring.json IMAGES OUT/test.parquet
    python -m lmms_plugin.tasks.sources.published_files refbench_pro annotation.jsonl IMAGES OUT/test.parquet

IMAGES is the folder with the unpacked images. `LMMS_PLUGIN_REF_L4=OUT` (and so on) then names the copy.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet as pq
from loguru import logger

from lmms_plugin.tasks.sources import writing
from lmms_plugin.tasks.sources.annotations import entries, read
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.files import json_object
from lmms_plugin.utils.messages import counted

_TEXT, _INTEGER, _NUMBER = datasets.Value("string"), datasets.Value("int64"), datasets.Value("float64")
_BOX = datasets.List(_NUMBER)

Rows = Iterator[dict[str, Any]]


class Form(NamedTuple):
    """Published form of a benchmark: how its annotations are read, and the columns of the copy.

    Attributes:
        read: Function from the path of the annotations to rows without their image.
        name: Column that holds the name of the image's file.
        columns: Columns of the copy, besides `image`.
    """

    read: Callable[[Path], Rows]
    name: str
    columns: Mapping[str, Any]


def rows(form: Form, annotations: Path, images: Path) -> Rows:
    """Yield one row per expression, in the order of the annotations.

    Raises:
        DatasetError: The annotations are not in the published form, or an image is missing.
    """
    for row in form.read(annotations):
        missing = form.columns.keys() - row.keys()
        if missing:
            raise DatasetError(f"{annotations}: expected {sorted(missing)} in every entry, got {str(row)[:120]}")
        path = images / str(row[form.name])
        if not path.is_file():
            raise DatasetError(f"{images}: expected the image {row[form.name]!r} that {annotations} names")
        yield {name: row[name] for name in form.columns} | {"image": {"bytes": path.read_bytes(), "path": path.name}}


def write(name: str, annotations: Path, images: Path, out: Path) -> int:
    """Write the parquet file and return the number of its rows.

    Raises:
        DatasetError: As `rows`.
    """
    form = FORMS[name]
    features = datasets.Features({**form.columns, "image": datasets.Image()})
    return writing.write(rows(form, annotations, images), features, out)


def _table(path: Path) -> Rows:
    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _mdetr(path: Path) -> Rows:
    """Yield one row per entry of `images`, which are expressions, with its boxes gathered from `annotations`."""
    content = read(path)
    boxes: defaultdict[int, list[list[float]]] = defaultdict(list)
    for entry in entries(path, "annotations", ("image_id", "empty", "bbox"), content):
        if not entry["empty"]:
            boxes[entry["image_id"]].append(entry["bbox"])
    expressions = entries(path, "images", ("id", "caption", "file_name", "width", "height"), content)
    if unknown := boxes.keys() - {entry["id"] for entry in expressions}:
        raise DatasetError(f"{path}: 'annotations' refer to {sorted(unknown)[:3]}, which are no 'id' of 'images'")
    for entry in expressions:
        yield {**entry, "bboxes": boxes[entry["id"]]}


def _questions(path: Path) -> Rows:
    content = read(path)
    if not isinstance(content, list) or not content:
        raise DatasetError(f"{path}: expected a list of expressions, got {str(content)[:80]}")
    for entry in content:
        if any(mark in str(entry.get("question")) for mark in ("[refer]", "<p>", "<image>")):
            raise DatasetError(f"{path}: expected a bare expression in 'question', got {entry['question']!r}")
        unique = entry.get("is_unique", entry.get("unique"))
        yield {"obj_cls": "", "size_group": "", **entry, "is_unique": None if unique is None else bool(unique)}


def _lines(path: Path) -> Rows:
    """Yield one row per line of RefBench-PRO; expressions whose box its authors keep back are left out and counted."""
    kept_back = 0
    with path.open("rb") as lines:
        for number, line in enumerate(filter(bytes.strip, lines), start=1):
            try:
                row = json_object(line, f"{path}:{number}")
            except ValueError as error:
                raise DatasetError(f"{error}; fetch it again") from error
            box = row.get("bbox") or []
            if box or row.get("task_type") == "reject":
                yield {**row, "bbox": box}
            else:
                kept_back += 1
    if kept_back:
        logger.warning("{}: {} left out, their boxes are not published", path, counted(kept_back, "expression"))


FORMS: Mapping[str, Form] = {
    "ref_l4": Form(
        _table,
        "file_name",
        {
            "id": _INTEGER,
            "caption": _TEXT,
            "bbox": _BOX,
            "bbox_area": _NUMBER,
            "ori_category_id": _TEXT,
            "height": _INTEGER,
            "width": _INTEGER,
            "file_name": _TEXT,
            "is_rewrite": datasets.Value("bool"),
        },
    ),
    "refdrone": Form(
        _mdetr,
        "file_name",
        {
            "id": _INTEGER,
            "caption": _TEXT,
            "bboxes": datasets.List(_BOX),
            "height": _INTEGER,
            "width": _INTEGER,
            "file_name": _TEXT,
        },
    ),
    "refbench_pro": Form(
        _lines,
        "image_path",
        {
            "image_path": _TEXT,
            "task_type": _TEXT,
            "expression": _TEXT,
            "bbox": _BOX,
            "width": _INTEGER,
            "height": _INTEGER,
        },
    ),
    "vrsbench": Form(
        _questions,
        "image_id",
        {
            "question_id": _INTEGER,
            "image_id": _TEXT,
            "question": _TEXT,
            "ground_truth": _TEXT,
            "is_unique": datasets.Value("bool"),
            "obj_cls": _TEXT,
            "size_group": _TEXT,
        },
    ),
}
"""Benchmarks by name."""


def main() -> None:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FORMS)
    for name in ("annotations", "images", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        written = write(given.name, given.annotations, given.images, given.out)
    except (DatasetError, OSError) as error:
        parser.error(str(error))
    print(f"{counted(written, 'expression')} written to {given.out}")


if __name__ == "__main__":
    main()
