"""Demo scenes as rows in RefCOCO+'s schema.

One row is one object; its `answer` lists the expressions that refer to it; `bbox` is x, y, width, height in pixels.
"""

import io
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

from lmms_plugin.demo.scenes import Pixels, scene
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs

# lmms-lab/RefCOCOplus has this question in every row; tasks about expressions read `answer` instead.
QUESTION = "Please carefully observe the area circled in the image and come up with a caption for the area."
DEV_SCENES = 1000
# Training uses up to four shapes, but the packaged checkpoint was tuned on up to three.
MOST_OBJECTS = 3
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
    """Compress RGB pixels (h, w, 3) like COCO's photographs, at full colour resolution."""
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
    """Draw scenes to train a learned confidence on, neither reported on nor seen by the checkpoint.

    Args:
        given: Packaged data that lmms-eval loaded; unused.
    """
    return ExpressionDocs(Dataset.from_list(list(rows("dev", DEV_SCENES)), features=FEATURES))
