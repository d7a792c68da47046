"""Calibration samples as a model takes them: its own question, its own processor, its own answers."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from lmms_plugin.dialects import Dialect
from lmms_plugin.prompts import framed, mean_colour
from lmms_plugin.quant_backends.calibration import CalibrationSample, CalibrationSpec
from lmms_plugin.quant_backends.report import CalibrationReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWER_TOKENS = 48
"""Longest answer that a model writes for itself: a box with its label takes about forty tokens."""


def encode(processor: Any, image: Image.Image, prompt: str, answer: str | None = None) -> dict[str, Any]:
    """Return the model inputs of one question, with its answer or ready to be answered.

    Args:
        processor: Of the checkpoint, with or without a chat template.
        image: RGB.
        prompt: The question, without image tokens.
        answer: None to end where the model starts to write.
    """
    if getattr(processor, "chat_template", None):
        user: list[dict[str, Any]] = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": user}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return dict(
            processor.apply_chat_template(
                messages,
                add_generation_prompt=answer is None,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    token = getattr(processor, "image_token", "<image>")
    text = f"{token}{prompt}" if answer is None else f"{token}{prompt}\n{answer}"
    batch = dict(processor(text=text, images=image, return_tensors="pt"))
    # PaliGemma's processor adds training labels, which would make the model compute a loss.
    batch.pop("labels", None)
    return batch


def write_answers(
    model: PreTrainedModel, processor: Any, samples: Sequence[CalibrationSample], dialect: Dialect
) -> list[CalibrationSample]:
    """Let the model answer every sample that has no answer yet, greedily, one by one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    answered = []
    for sample in tqdm(samples, desc="Writing calibration answers", leave=False, disable=None):
        if sample.answer is None and sample.box is None:
            batch = to_model(encode(processor, shown(sample, dialect, processor), question(sample, dialect)), model)
            written = model.generate(**batch, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            new = written[0, batch["input_ids"].shape[1] :]
            sample = sample._replace(answer=tokenizer.decode(new, skip_special_tokens=True))
        answered.append(sample)
    return answered


def shown(sample: CalibrationSample, dialect: Dialect, processor: Any) -> Image.Image:
    """Return the image of a sample as an evaluation would show it: padded where a box refers to the padded square."""
    return sample.image if sample.expression is None else framed(sample.image, dialect, mean_colour(processor))


def question(sample: CalibrationSample, dialect: Dialect) -> str:
    """Return the question of a sample, in the dialect of the model where it is about a box."""
    return sample.prompt or "" if sample.expression is None else dialect.ask(sample.expression)


def written_answer(sample: CalibrationSample, dialect: Dialect, processor: Any) -> str:
    """Return the answer of a sample as the model would write it."""
    if sample.answer is not None or sample.box is None:
        return sample.answer or ""
    batch = encode(processor, shown(sample, dialect, processor), question(sample, dialect))
    return dialect.write(
        sample.box,
        original_size=sample.image.size,
        model_size=_model_size(batch, processor),
        expression=sample.expression or "",
    )


def build_batches(
    model: PreTrainedModel,
    processor: Any,
    spec: CalibrationSpec,
    samples: Sequence[CalibrationSample],
    dialect: Dialect,
    *,
    keep_logits: bool,
) -> tuple[list[dict[str, Any]], CalibrationReport]:
    """Encode samples for one forward pass each.

    Args:
        model: Loaded and unquantized; it writes the answers that are missing.
        processor: Of the same checkpoint.
        spec: Where the samples come from.
        samples: From `CalibrationSpec.load_samples`.
        dialect: Of the model.
        keep_logits: Whether the output projection must see every position (it is to be quantized itself).

    Returns:
        Keyword arguments for the model, and the account of them.
    """
    samples = write_answers(model, processor, samples, dialect)
    digest = hashlib.sha256()
    batches = []
    for sample in samples:
        prompt, answer = question(sample, dialect), written_answer(sample, dialect, processor)
        for part in (str(sample.image.size), sample.image.tobytes(), prompt, answer):
            digest.update(part if isinstance(part, bytes) else part.encode())
            digest.update(b"\0")
        image = shown(sample, dialect, processor)
        batches.append(to_model(encode(processor, image, prompt, answer), model) | {"use_cache": False})
    if not keep_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        batches = [batch | {"logits_to_keep": 1} for batch in batches]
    tokens = sum(batch["input_ids"].shape[1] for batch in batches)
    report = CalibrationReport(str(spec), len(batches), tokens, spec.seed, digest.hexdigest(), spec.force)
    return batches, report


def to_model(batch: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Move tensors to the device of the model's input, floats into its dtype."""
    embedding = model.get_input_embeddings().weight

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(embedding.device, embedding.dtype if value.is_floating_point() else value.dtype)

    return {key: move(value) for key, value in batch.items()}


def _model_size(batch: dict[str, Any], processor: Any) -> tuple[int, int]:
    """Return (width, height) in pixels of the image as the model sees it."""
    if "image_grid_thw" in batch:
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        patch = processor.image_processor.patch_size
        return columns * patch, rows * patch
    height, width = batch["pixel_values"].shape[-2:]
    return width, height
