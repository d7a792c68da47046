"""Calibration samples as a model takes them: its own question, its own processor, its own answers."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from lmms_plugin.dialects import Dialect
from lmms_plugin.prompts import framed, mean_colour
from lmms_plugin.quant_backends.activations import ROLES, TOKEN_ROLES, WEIGHED
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
    by_role: bool = False,
) -> tuple[list[dict[str, Any]], CalibrationReport]:
    """Encode samples for one forward pass each.

    Args:
        model: Loaded and unquantized; it writes the answers that are missing.
        processor: Of the same checkpoint.
        spec: Where the samples come from.
        samples: From `CalibrationSpec.load_samples`.
        dialect: Of the model.
        keep_logits: Whether the output projection must see every position (it is to be quantized itself).
        by_role: Add to each sample, under `TOKEN_ROLES`, the role of each of its positions.

    Returns:
        Keyword arguments for the model, and the account of them.

    Raises:
        ValueError: `by_role`, and a sample holds no position for its image or for its answer.
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
        batch = encode(processor, image, prompt, answer)
        if by_role:
            batch[TOKEN_ROLES] = token_roles(batch, encode(processor, image, prompt), model.config)
        batches.append(to_model(batch, model) | {"use_cache": False})
    if not keep_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        batches = [batch | {"logits_to_keep": 1} for batch in batches]
    tokens = sum(batch["input_ids"].shape[1] for batch in batches)
    report = CalibrationReport(str(spec), len(batches), tokens, spec.seed, digest.hexdigest(), spec.force)
    return batches, report


def token_roles(answered: Mapping[str, Any], asked: Mapping[str, Any], config: Any) -> torch.Tensor:
    """Say which positions of a sample are its image, which the rest of its prompt, and which its answer.

    Args:
        answered: Question and answer, from `encode`.
        asked: The question alone.
        config: Of the model, for its image token; not needed where the processor tells image tokens itself.

    Returns:
        (tokens,) uint8, places in `ROLES`. The answer begins where the two encodings part and takes in what the chat
        template closes it with; what marks the beginning and end of an image is text.

    Raises:
        ValueError: There is no position of the image, or none of the answer.
    """
    ids = answered["input_ids"][0]
    marked = answered.get("mm_token_type_ids")
    image = ids == config.image_token_id if marked is None else marked[0] == 1
    common = min(len(ids), asked["input_ids"].shape[1])
    differing = (ids[:common] != asked["input_ids"][0, :common]).nonzero()
    start = int(differing[0]) if len(differing) else common
    roles = torch.full_like(ids, ROLES.index("text"), dtype=torch.uint8)
    roles[start:] = ROLES.index("answer")
    roles[image] = ROLES.index("image")
    for role in WEIGHED:
        if not (roles == ROLES.index(role)).any():
            raise ValueError(
                f"a calibration sample has no position for its {role} among its {len(ids)}: "
                "image and answer cannot be weighed against each other"
            )
    return roles


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
