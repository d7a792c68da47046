"""Pictures of predicted and true boxes, one row per expression and one column per model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageDraw

from lmms_plugin import demo
from lmms_plugin.tasks.registry import cells

ROWS = 8
SIDE = 224
CAPTION = 26
TRUE, PREDICTED = (0, 160, 0), (220, 0, 0)
PAPER, INK = (255, 255, 255), (0, 0, 0)


class Logged(Protocol):
    """A run whose model's name and logged grounding records can be read."""

    @property
    def model(self) -> str: ...  # noqa: D102

    def records(self, task: str) -> list[dict[str, Any]]: ...  # noqa: D102


def sheet(runs: Sequence[Logged], task: str, path: Path) -> Path:
    """Write a PNG of the expressions on which the models disagree most: true box green, predicted box red.

    Args:
        runs: finished runs; the first is the baseline, whose right answers that others lose come first.
        task: name of the task (its shift is applied to the pictures as the models saw them).
        path: where to write.
    """
    columns = [one.records(task) for one in runs]
    shown = _most_telling(columns)
    picture = Image.new("RGB", (SIDE * len(runs), (SIDE + CAPTION) * len(shown) + CAPTION), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, one in enumerate(runs):
        draw.text((column * SIDE + 4, 6), one.model, fill=INK)
    images = _images(task, {columns[0][index]["id"] for index in shown})
    for row, index in enumerate(shown):
        for column, records in enumerate(columns):
            record = records[index]
            corner = (column * SIDE, CAPTION + row * (SIDE + CAPTION))
            picture.paste(_with_boxes(images[record["id"]], record), corner)
            text = f"{record['expression']}  IoU {record['score']:.2f}" if column == 0 else f"IoU {record['score']:.2f}"
            draw.text((corner[0] + 4, corner[1] + SIDE + 6), text, fill=INK)
    picture.save(path)
    return path


def _most_telling(columns: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Indices of the expressions where the baseline loses most to quantization, one per image."""
    base, *others = columns

    def lost(index: int) -> float:
        return sum(float(base[index]["score"]) - float(other[index]["score"]) for other in others)

    chosen: dict[str, int] = {}
    for index in sorted(range(len(base)), key=lambda i: (-lost(i), i)):
        chosen.setdefault(base[index]["image"], index)
    return list(chosen.values())[:ROWS]


def _images(task: str, wanted: set[str]) -> dict[str, Image.Image]:
    """The images of the wanted expressions, by expression id, under the task's shift."""
    # Only when all has run: they take seconds to import.
    import datasets

    from lmms_plugin.tasks.grounding import comprehension

    entry = cells.entries().get(task)
    kwargs = entry.overrides["lmms_eval_specific_kwargs"]["default"] if entry else None
    docs = comprehension.process_docs(datasets.load_dataset(demo.DATA, split="test"))
    names = docs.remove_columns("image")
    found = [index for index, doc in enumerate(names) if doc["expression_id"] in wanted]
    return {names[i]["expression_id"]: comprehension.doc_to_visual(docs[i], kwargs)[0] for i in found}


def _with_boxes(image: Image.Image, record: Mapping[str, Any]) -> Image.Image:
    enlarged = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(enlarged)
    for box, colour in ((record["target"], TRUE), (record["box"], PREDICTED)):
        if box:
            draw.rectangle([value * SIDE for value in box], outline=colour, width=3)
    return enlarged
