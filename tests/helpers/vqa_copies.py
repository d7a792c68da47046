"""Small VQAv2, AdVQA and VizWiz-VQA in the schemas of the hub, of crops of real photographs."""

import io
from collections.abc import Iterator
from pathlib import Path

import datasets
from helpers import photographs

STRUCTURED = datasets.Features(
    {
        "question_type": datasets.Value("string"),
        "multiple_choice_answer": datasets.Value("string"),
        "answers": datasets.List(
            {
                "answer": datasets.Value("string"),
                "answer_confidence": datasets.Value("string"),
                "answer_id": datasets.Value("int64"),
            }
        ),
        "image_id": datasets.Value("int64"),
        "answer_type": datasets.Value("string"),
        "question_id": datasets.Value("int64"),
        "question": datasets.Value("string"),
        "image": datasets.Image(),
    }
)
PLAIN = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "category": datasets.Value("string"),
    }
)
SPLITS = {"vqav2": "validation", "advqa": "validation", "vizwiz": "val"}
NAMES = ("astronaut", "chelsea", "coffee", "rocket")
QUESTIONS = (
    ("Is there an animal in the picture?", ["no"] * 10),
    (
        "What is shown?",
        ["a woman", "woman", "astronaut", "astronaut", "Astronaut.", "lady", "woman", "1", "one", "her"],
    ),
    ("How many cups are there?", ["1", "one", "1", "1", "2", "one", "0", "none", "1", "1"]),
)


def rows(dataset: str, images: int = 40) -> datasets.Dataset:
    """Return the rows of a dataset: three questions per photograph, in VizWiz one."""
    make, features = (_plain, PLAIN) if dataset == "vizwiz" else (_structured, STRUCTURED)
    return datasets.Dataset.from_list(list(make(dataset, images)), features=features)


def _structured(dataset: str, images: int) -> Iterator[dict[str, object]]:
    first = 0 if dataset == "vqav2" else images // 2
    for image in range(first, first + images):
        for number, (question, answers) in enumerate(QUESTIONS):
            yield {
                "question_type": "what",
                "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                    for i, answer in enumerate(answers)
                ],
                "image_id": image,
                "answer_type": "other",
                "question_id": 1000 * image + number,
                "question": question,
                "image": {"bytes": jpeg(image), "path": None},
            }


def _plain(dataset: str, images: int) -> Iterator[dict[str, object]]:
    for image in range(images):
        question, answers = QUESTIONS[image % 3]
        yield {
            "question_id": f"VizWiz_val_{image:08d}.jpg",
            "image": {"bytes": jpeg(image), "path": None},
            "question": question,
            "answers": answers,
            "category": "other",
        }


def write(folder: Path) -> dict[str, str]:
    """Write all three as parquet and return the environment that names them."""
    environment = {}
    for dataset, split in SPLITS.items():
        (folder / dataset).mkdir(parents=True, exist_ok=True)
        rows(dataset).to_parquet(folder / dataset / f"{split}-00000-of-00001.parquet")
        environment[f"LMMS_PLUGIN_{dataset.upper()}"] = str(folder / dataset)
    return environment


def jpeg(image: int) -> bytes:
    corner = 8 * (image // len(NAMES))
    buffer = io.BytesIO()
    photograph = photographs.photograph(NAMES[image % len(NAMES)])
    photograph.crop((corner, corner, corner + 96, corner + 64)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
