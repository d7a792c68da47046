"""Write demo scenes as parquet in RefCOCO+'s own schema.

    python -m lmms_plugin.demo.dataset --out data

One row is one object; its `answer` lists the expressions that mean it; `bbox` is x, y, width, height in pixels.
"""

import argparse
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

from lmms_plugin.demo.scenes import Pixels, scene
from lmms_plugin.tasks.expressions import ExpressionDocs

# lmms-lab/RefCOCOplus asks this of every row; tasks about expressions read `answer` instead.
QUESTION = "Please carefully observe the area circled in the image and come up with a caption for the area."
SCENES = {"test": 130, "val": 100}
DEV_SCENES = 1000
# Training goes up to four shapes, but the packaged checkpoint was tuned on up to three.
MOST_OBJECTS = 3
# Without the split names spelled out, `datasets` would call "val" "validation". FILES are listed by `write`.
CARD = """---
configs:
- config_name: default
  data_files:
FILES---

# Coloured shapes with referring expressions

Synthetic scenes of one to three shapes in the schema of lmms-lab/RefCOCOplus: circles, squares, triangles and crosses
in six colours, small or large, plain or hollow. One row is one object; `answer` lists the expressions that mean it
and nothing else in its scene, `bbox` is x, y, width, height in pixels. Drawn by `lmms_plugin.demo.scenes`, written by
`python -m lmms_plugin.demo.dataset`. It is a demonstration: numbers measured on it say nothing about photographs.
"""
FEATURES = Features(
    {
        "question_id": Value("string"),
        "image": Image(),
        "question": Value("string"),
        "answer": List(Value("string")),
        "segmentation": List(Value("float32")),
        "bbox": List(Value("float32")),
        "iscrowd": Value("int8"),
        "file_name": Value("string"),
    }
)


def jpeg(image: Pixels) -> bytes:
    """Compress RGB pixels (h, w, 3) as COCO's photographs are, at full colour resolution."""
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def outline(mask: np.ndarray) -> list[float]:
    """Trace a silhouette (h, w) as COCO polygons do: x1, y1, x2, y2, … in pixels."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [float(v) for v in max(contours, key=cv2.contourArea).ravel()]


def rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the first `count` scenes of a split, one per object."""
    for index in range(count):
        drawn = scene(split, index, max_objects=MOST_OBJECTS)
        name = f"shapes_{split}_{index:04d}"
        file_name = f"{name}.jpg"
        image = {"bytes": jpeg(drawn.image), "path": file_name}
        for k, item in enumerate(drawn.objects):
            yield {
                "question_id": f"{name}_{k}",
                "image": image,
                "question": QUESTION,
                "answer": list(item.expressions),
                "segmentation": outline(drawn.owner == k),
                "bbox": [float(v) for v in item.box],
                "iscrowd": 0,
                "file_name": file_name,
            }


def dev(given: Dataset) -> ExpressionDocs:
    """Scenes to train a learned confidence on, neither reported on nor seen by the checkpoint, drawn when asked for.

    Args:
        given: what lmms-eval loaded of the packaged data, which is of no use here.
    """
    return ExpressionDocs(Dataset.from_list(list(rows("dev", DEV_SCENES)), features=FEATURES))


def write(folder: Path) -> None:
    """Write every split below `folder` as `<split>-<digest>.parquet`, and the card that lists these files.

    The digest is of the content: `datasets` knows a folder with a card by the folder's name and the file names in the
    card alone, and would go on serving its cached copy of other scenes under the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = ""
    for split, count in SCENES.items():
        for former in folder.glob(f"{split}-*.parquet"):
            former.unlink()
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(list(rows(split, count)), schema=FEATURES.arrow_schema)
        # All rows of a scene hold its picture; a dictionary page large enough for every picture keeps one copy of each.
        pq.write_table(table, buffer, compression="zstd", dictionary_pagesize_limit=1 << 25)
        name = f"{split}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:12]}.parquet"
        (folder / name).write_bytes(buffer.getvalue())
        listed += f"  - split: {split}\n    path: {name}\n"
    (folder / "README.md").write_text(CARD.replace("FILES", listed))


def main(argv: list[str] | None = None) -> None:
    """Write the demo data where `--out` says."""
    parser = argparse.ArgumentParser(prog="python -m lmms_plugin.demo.dataset", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    write(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
