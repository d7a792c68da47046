"""Write a VQA dataset in the challenge's files as parquet in the schema of the hub's VQAv2.

    python -m lmms_plugin.tasks.sources.official_vqa QUESTIONS.json ANNOTATIONS.json IMAGES OUT/validation.parquet

AdVQA is published in this form alone (v1_OpenEnded_mscoco_val2017_advqa_questions.json,
v1_mscoco_val2017_advqa_annotations.json, COCO's val2014 photographs). `LMMS_PLUGIN_ADVQA=OUT` then names the copy.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from lmms_plugin.tasks.sources import writing
from lmms_plugin.tasks.sources.annotations import entries
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.messages import counted

FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("int64"),
        "image_id": datasets.Value("int64"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(
            {
                "answer": datasets.Value("string"),
                "answer_confidence": datasets.Value("string"),
                "answer_id": datasets.Value("int64"),
            }
        ),
    }
)
_IDS = ("question_id", "image_id")
_ANSWER = ("answer", "answer_confidence", "answer_id")


def rows(questions: Path, annotations: Path, images: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per question, in the order of its file.

    Raises:
        DatasetError: A file is not in the challenge's form, a question has no annotation or another photograph there,
            or its photograph is missing.
    """
    annotated = {entry["question_id"]: entry for entry in entries(annotations, "annotations", {*_IDS, "answers"})}
    for question in entries(questions, "questions", {*_IDS, "question"}):
        number = question["question_id"]
        annotation = annotated.get(number)
        if annotation is None:
            raise DatasetError(f"{annotations}: expected an annotation of question {number} of {questions}")
        if annotation["image_id"] != question["image_id"]:
            raise DatasetError(
                f"question {number} is about photograph {question['image_id']} in {questions} and about "
                f"{annotation['image_id']} in {annotations}"
            )
        photograph = _photograph(images, question["image_id"])
        yield {
            "question_id": number,
            "image_id": question["image_id"],
            "image": {"bytes": photograph.read_bytes(), "path": photograph.name},
            "question": question["question"],
            "answers": [{name: answer.get(name) for name in _ANSWER} for answer in annotation["answers"]],
        }


def write(questions: Path, annotations: Path, images: Path, out: Path) -> int:
    """Write the parquet file and return the number of its rows.

    Raises:
        DatasetError: As `rows`.
    """
    return writing.write(rows(questions, annotations, images), FEATURES, out)


def _photograph(folder: Path, number: int) -> Path:
    names = [f"COCO_val2014_{number:012d}.jpg", f"{number:012d}.jpg"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DatasetError(f"{folder}: expected photograph {number} as {' or '.join(names)}")


def main() -> None:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("questions", "annotations", "images", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    try:
        written = write(given.questions, given.annotations, given.images, given.out)
    except (DatasetError, OSError) as error:
        parser.error(str(error))
    print(f"{counted(written, 'question')} written to {given.out}")


if __name__ == "__main__":
    main()
