"""A small RefCOCO+ in its exact schema, of photographs that ship inside scikit-image and scikit-learn.

Boxes were drawn by hand on the photographs, xywh in pixels; expressions follow RefCOCO+'s rule of no location words.
"""

import io
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.List(datasets.Value("string")),
        "segmentation": datasets.List(datasets.Value("float32")),
        "bbox": datasets.List(datasets.Value("float32")),
        "iscrowd": datasets.Value("int8"),
        "file_name": datasets.Value("string"),
    }
)


class Referent(NamedTuple):
    photograph: str
    bbox: tuple[float, float, float, float]
    expressions: tuple[str, ...]


REFERENTS = {
    "testA": [
        Referent("astronaut", (151, 15, 150, 178), ("smiling face of the woman", "short brown hair")),
        Referent("astronaut", (283, 343, 229, 169), ("black helmet", "shiny helmet with white rim", "helmet")),
        Referent("camera", (0, 62, 275, 450), ("man in a dark coat", "photographer")),
        Referent("coffee", (172, 18, 250, 285), ("cup of coffee", "white cup")),
        Referent("coffee", (322, 222, 80, 110), ("silver spoon",)),
        Referent("flower.jpg", (168, 85, 280, 272), ("fully visible orange flower",)),
    ],
    "testB": [
        Referent("astronaut", (358, 0, 105, 286), ("model of the space shuttle", "white and brown rocket")),
        Referent("chelsea", (230, 218, 54, 50), ("pink nose", "nose of the cat")),
        Referent("rocket", (303, 125, 40, 292), ("white rocket", "launching rocket", "bright tall rocket")),
        Referent("coins", (315, 154, 64, 66), ("largest coin",)),
        Referent("china.jpg", (64, 29, 300, 361), ("red and green pagoda", "temple")),
        Referent("camera", (255, 139, 76, 62), ("camera on the tripod",)),
    ],
}
REFERENTS["val"] = [REFERENTS["testA"][3], REFERENTS["testB"][4], REFERENTS["testB"][2], REFERENTS["testA"][0]]


def photograph(name: str) -> Image.Image:
    pixels = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    return Image.fromarray(np.asarray(pixels))


def rows(split: str) -> datasets.Dataset:
    names = sorted({referent.photograph for referents in REFERENTS.values() for referent in referents})
    return datasets.Dataset.from_list(
        [
            {
                "question_id": f"{split}-{number}",
                "image": {"bytes": _jpeg(referent.photograph), "path": None},
                "question": "Please carefully observe the area circled in the image and come up with a caption.",
                "answer": list(referent.expressions),
                "segmentation": [],
                "bbox": list(referent.bbox),
                "iscrowd": 0,
                "file_name": f"COCO_train2014_{names.index(referent.photograph):012d}_{number}.jpg",
            }
            for number, referent in enumerate(REFERENTS[split])
        ],
        features=FEATURES,
    )


def write(folder: Path) -> Path:
    """Write all splits as parquet into the folder, as a local copy of RefCOCO+ would lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in REFERENTS:
        rows(split).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def _jpeg(name: str) -> bytes:
    buffer = io.BytesIO()
    photograph(name).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
