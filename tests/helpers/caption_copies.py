"""Small COCO captions, Flickr30k, VQAv2 and GQA in the schemas of the hub, of crops of real photographs.

`load_dataset("owner/name")` takes a folder of that name below the working directory for the dataset, so a run in the
folder written here reads these copies wherever lmms-eval's own tasks name the hub's.
"""

from pathlib import Path

import datasets
from helpers import vqa_copies

TEXT, INTEGER = datasets.Value("string"), datasets.Value("int64")
TEXTS = datasets.List(TEXT)
SUBJECTS = ("a woman in an orange suit", "a cat with green eyes", "a cup of coffee", "a rocket on its pad")
WORDS = ("{}", "a photo of {}", "{} in the picture", "one can see {}", "this is {}")
IMAGES = 6

COCO = datasets.Features(
    {
        "question_id": TEXT,
        "image": datasets.Image(),
        "question": TEXT,
        "answer": TEXTS,
        "id": INTEGER,
        "license": datasets.Value("int8"),
        "file_name": TEXT,
        "coco_url": TEXT,
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "date_captured": TEXT,
    }
)
FLICKR30K = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": TEXTS,
        "sentids": TEXTS,
        "split": TEXT,
        "img_id": TEXT,
        "filename": TEXT,
    }
)
GQA_QUESTIONS = datasets.Features(
    {
        "id": TEXT,
        "imageId": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "fullAnswer": TEXT,
        "isBalanced": datasets.Value("bool"),
    }
)
GQA_IMAGES = datasets.Features({"id": TEXT, "image": datasets.Image()})


def captions(number: int) -> list[str]:
    subject = SUBJECTS[number % len(SUBJECTS)]
    return [f"{words.format(subject)} ({number})" for words in WORDS]


def image(number: int) -> dict[str, object]:
    return {"bytes": vqa_copies.jpeg(number), "path": None}


def coco() -> datasets.Dataset:
    rows = [
        {
            "question_id": f"COCO_val2014_{number:012d}.jpg",
            "image": image(number),
            "question": "Please carefully observe the image and come up with a caption for the image",
            "answer": captions(number),
            "id": number,
            "license": 1,
            "file_name": f"COCO_val2014_{number:012d}.jpg",
            "coco_url": "",
            "height": 64,
            "width": 96,
            "date_captured": "2013-11-14 11:18:45",
        }
        for number in range(IMAGES)
    ]
    return datasets.Dataset.from_list(rows, features=COCO)


def flickr30k(images: int = IMAGES, **changes: object) -> datasets.Dataset:
    rows = [
        {
            "image": image(number),
            "caption": captions(number),
            "sentids": [str(5 * number + i) for i in range(5)],
            "split": "test",
            "img_id": str(number),
            "filename": f"{1000 + number}.jpg",
            **changes,
        }
        for number in range(images)
    ]
    return datasets.Dataset.from_list(rows, features=FLICKR30K)


def gqa() -> tuple[datasets.Dataset, datasets.Dataset]:
    questions = [
        {
            "id": str(100 + number),
            "imageId": f"n{number // 2}",
            "question": ("Is there a cat?", "What is it?")[number % 2],
            "answer": ("yes", "cup")[number % 2],
            "fullAnswer": "Yes.",
            "isBalanced": True,
        }
        for number in range(2 * IMAGES)
    ]
    photographs = [{"id": f"n{number}", "image": image(number)} for number in range(IMAGES)]
    return (
        datasets.Dataset.from_list(questions, features=GQA_QUESTIONS),
        datasets.Dataset.from_list(photographs, features=GQA_IMAGES),
    )


def write(folder: Path) -> dict[str, str]:
    """Write all copies below `folder`, from where lmms-eval is then run; return the environment for our own tasks."""
    hub = folder / "lmms-lab-encoder"
    _put(coco(), hub / "COCO-Caption" / "data" / "val-00000-of-00001.parquet")
    _put(coco(), hub / "COCO-Caption2017" / "data" / "val-00000-of-00001.parquet")
    _put(vqa_copies.rows("vqav2", images=IMAGES), hub / "VQAv2" / "data" / "validation-00000-of-00001.parquet")
    names = ("testdev_balanced_instructions", "testdev_balanced_images")
    for name, rows in zip(names, gqa(), strict=True):
        _put(rows, hub / "GQA" / name / "testdev-00000-of-00001.parquet")
    parts = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: testdev\n    path: {name}/testdev-*\n" for name in names
    )
    (hub / "GQA" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    _put(flickr30k(), folder / "flickr30k" / "test-00000-of-00001.parquet")
    coco2014 = hub / "COCO-Caption"
    return {"LMMS_PLUGIN_FLICKR30K": str(folder / "flickr30k"), "LMMS_PLUGIN_COCO_CAPTION2014": str(coco2014)}


def _put(rows: datasets.Dataset, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(file)
