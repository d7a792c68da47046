"""Score a demo checkpoint through its own processor and `generate`, as any user would.

    python -m demo_training.evaluate

The command scores every expression of the packaged test split. The tasks of this package measure the same and more;
this module is what training looks at, and free of lmms-eval.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
)

from demo_training.architecture import DIALECT
from lmms_plugin.demo import CHECKPOINT, DATA
from lmms_plugin.demo.scenes import Scene
from lmms_plugin.protocol.boxes import Box, iou
from lmms_plugin.utils.images import opened


class Question(NamedTuple):
    """One expression about one picture, and the box it means."""

    image: Image.Image
    expression: str
    truth: Box


def about_scenes(scenes: Iterable[Scene]) -> list[Question]:
    """Every expression of every scene, in order."""
    return [
        Question(image, expression, Box.from_xywh(item.box, image.size))
        for drawn in scenes
        for image in [Image.fromarray(drawn.image)]
        for item in drawn.objects
        for expression in item.expressions
    ]


def about_split(split: str, folder: str = DATA) -> list[Question]:
    """Every expression of a split of the packaged data, in order."""
    return [
        Question(image, expression, Box.from_xywh(row["bbox"], image.size))
        for row in datasets.load_dataset(folder, split=split)
        for image in [opened(row["image"])]
        for expression in row["answer"]
    ]


def conversation(expression: str) -> list[dict[str, object]]:
    """Chat messages that ask where `expression` is."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DIALECT.ask(expression)}]}]


@torch.inference_mode()
def generate(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, questions: Sequence[Question]
) -> list[str]:
    """Answer questions greedily, as one left-padded batch."""
    prompts = [
        processor.apply_chat_template(conversation(q.expression), add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    inputs = processor(text=prompts, images=[[q.image] for q in questions], padding=True, return_tensors="pt")
    output = model.generate(**inputs.to(model.device), max_new_tokens=16, do_sample=False)
    texts: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def overlaps(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    questions: Sequence[Question],
    batch_size: int = 64,
) -> list[float]:
    """IoU of the generated box with the true one per question; 0 where the answer holds no box."""
    found: list[float] = []
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        for question, text in zip(asked, generate(model, processor, asked), strict=True):
            parsed = DIALECT.parse(text, original_size=question.image.size, model_size=None)
            found.append(iou(parsed.box, question.truth) if parsed.box else 0.0)
    return found


def main(argv: list[str] | None = None) -> None:
    """Print accuracy at three thresholds and mean IoU on a packaged split."""
    parser = argparse.ArgumentParser(prog="python -m demo_training.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="folder (default: the packaged one)")
    parser.add_argument("--split", default="test", choices=("test", "val"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype="auto").eval()
    questions = about_split(args.split)
    found = np.array(overlaps(model, AutoProcessor.from_pretrained(args.checkpoint), questions))
    scores = ", ".join(f"acc@{t} {(found >= t).mean():.3f}" for t in (0.5, 0.75, 0.9))
    print(f"{len(found)} expressions of {args.split}: {scores}, mean IoU {found.mean():.3f}")


if __name__ == "__main__":
    main()
