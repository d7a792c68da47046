"""Calibration samples as a model takes them: its own question, its own processor, its own answers."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from loguru import logger
from PIL import Image
from tqdm import tqdm

from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.protocol.plain_prompts import template_for
from lmms_plugin.protocol.prompts import framed, mean_colour, placeholder
from lmms_plugin.protocol.reasoning import left_open, separate
from lmms_plugin.quant_backends.calibration.journal import Journal
from lmms_plugin.quant_backends.calibration.sources import REFUSE, CalibrationSample, CalibrationSpec
from lmms_plugin.quant_backends.layers.wide_products import WideProducts
from lmms_plugin.quant_backends.plans.quant_report import CalibrationReport
from lmms_plugin.quant_backends.statistics import ROLES, TOKEN_ROLES, WEIGHED
from lmms_plugin.utils.end_tokens import end_tokens
from lmms_plugin.utils.messages import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWER_TOKENS = 48
"""Longest answer that a model writes for itself: a box with its label takes about forty tokens."""

QUESTION_TOKENS = 24
LONGEST_QUESTION = 20
"""Words; what is longer is no question but a description that was cut off."""

PATIENCE = 4
"""Questions in a row that a model may fail to write before it is taken to speak nothing but its dialect."""

_TURN_HEADER = 16
"""Tokens at the end of a prompt within which a chat template opens reasoning."""

LOOPING_UNITS = 12
"""Words and marks below which an answer that repeats itself is no loop: a box of one number has seven."""

LOOPING_TIMES = 3
"""How often the same must follow upon itself."""

REQUESTS = {
    "expression": (
        "Name one object in this image in a few words that tell it from the others. Answer with those words alone."
    ),
    "question": "Write one short question about this image. Answer with the question alone.",
}
"""What a model is asked when it is to write a question of its own, by `CalibrationSample.wanted`."""


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
    plain = template_for(processor)
    # A processor of which templates are declared places its image tokens itself.
    token = placeholder(processor) if plain is None else ""
    given: dict[str, Any] = {"text": f"{token}{prompt}" if plain is None else plain.write(prompt)}
    if answer is not None and "suffix" in inspect.signature(processor.__call__).parameters:
        # PaliGemma reads its prompt in both directions but its answer in one, and its processor marks which is which.
        given["suffix"] = answer
    elif answer is not None:
        given["text"] += f"\n{answer}" if plain is None else f" {answer}"
    batch = dict(processor(**given, images=image, return_tensors="pt"))
    # PaliGemma's processor adds training labels, which would make the model compute a loss.
    batch.pop("labels", None)
    return batch


def answered(model: PreTrainedModel, processor: Any, image: Image.Image, prompt: str, answer: str) -> dict[str, Any]:
    """Return the model inputs of one question with its answer, which an encoder-decoder reads apart from it."""
    if not model.config.is_encoder_decoder:
        return encode(processor, image, prompt, answer)
    written = processor.tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    begin = torch.tensor([[model.config.get_text_config(decoder=True).decoder_start_token_id]])
    return encode(processor, image, prompt) | {"decoder_input_ids": torch.cat([begin, written], dim=1)}


class WrittenAnswer(NamedTuple):
    """What a model wrote.

    Attributes:
        text: Without special tokens.
        finished: Whether it ended by itself.
        opened: The tag of a reasoning that the prompt opened; empty for none.
    """

    text: str
    finished: bool
    opened: str = ""

    @property
    def whole(self) -> str:
        """The text behind the tag that it belongs to."""
        return self.opened + self.text


class Writer:
    """Lets a model write the questions and answers that calibration samples lack, greedily, one by one.

    A model that only speaks its grounding dialect writes a box, or nothing, where it is asked for a question. Such
    samples keep the expression that they were drawn with; after `PATIENCE` of them in a row the model is not asked
    for questions again.

    Args:
        model: Loaded and unquantized.
        processor: Of the same checkpoint.
        dialect: Of the model.
        journal: Remembers what has been written; None forgets it.

    Attributes:
        own: How many questions and expressions are the model's own.
        answers: That it has written.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, dialect: Dialect, journal: Journal | None) -> None:
        self.model, self.processor, self.dialect, self.journal = model, processor, dialect, journal
        self.own = 0
        self.answers: list[WrittenAnswer] = []
        self._failures = 0
        self._written: list[list[Any]] = [] if journal is None else journal.noted("written") or []
        self._next = 0

    def complete(self, sample: CalibrationSample) -> CalibrationSample:
        """Return a sample with its question and its answer; samples come in their order."""
        if not sample.unanswered:
            return sample
        if self._next == len(self._written):
            asked = self._question(sample)
            self._written.append([asked, *self._answer(_asking(sample, asked))])
            if self.journal is not None:
                self.journal.note("written", self._written)
        asked, *answer = self._written[self._next]
        self.answers.append(WrittenAnswer(*answer))
        self._next += 1
        self.own += asked is not None
        self._failures = 0 if asked is not None else self._failures + 1
        return _asking(sample, asked)._replace(answer=self.answers[-1].whole)

    def _question(self, sample: CalibrationSample) -> str | None:
        if sample.wanted is None or self._failures >= PATIENCE:
            return None
        text = self._write(sample.image, REQUESTS[sample.wanted], QUESTION_TOKENS).whole
        return wording(separate(text).answer_text, self.dialect)

    def _answer(self, sample: CalibrationSample) -> WrittenAnswer:
        image = shown(sample, self.dialect, self.processor)
        return self._write(image, question(sample, self.dialect), ANSWER_TOKENS)

    def _write(self, image: Image.Image, prompt: str, tokens: int) -> WrittenAnswer:
        batch = to_model(encode(self.processor, image, prompt), self.model)
        with WideProducts():
            written = self.model.generate(**batch, max_new_tokens=tokens, do_sample=False)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        start = 1 if self.model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        ids = written[0, start:]
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        finished = len(ids) < tokens or int(ids[-1]) in end_tokens(self.model, tokenizer)
        return WrittenAnswer(text, finished, left_open(tokenizer.decode(batch["input_ids"][0, -_TURN_HEADER:])))


def degenerate(text: str) -> str | None:
    """Say what is wrong with an answer that says nothing: ``empty``, ``blank`` or ``looping``; None if it is none.

    It loops if the same words and marks follow upon one another `LOOPING_TIMES` or more, over more than half of it.

    >>> degenerate("the cat and the dog and the cat")
    >>> degenerate("A cat. " + "It is a cat. " * 9)
    'looping'
    """
    if not text.strip():
        return "blank" if text else "empty"
    units = re.findall(r"\w+|[^\w\s]", text)
    for period in range(1, len(units) // LOOPING_TIMES + 1):
        run = longest = 0
        for one, other in zip(units, units[period:], strict=False):
            run = run + 1 if one == other else 0
            longest = max(longest, run)
        repeated = longest + period
        if repeated >= max(LOOPING_UNITS, LOOPING_TIMES * period) and 2 * repeated > len(units):
            return "looping"
    return None


def expect_answers(answers: Sequence[WrittenAnswer], spec: CalibrationSpec) -> dict[str, int]:
    """Count the degenerate ones among the answers that a model wrote itself, and tell of them.

    Returns:
        Kind -> how many.

    Raises:
        ValueError: They are more than half of the answers, and `spec` does not allow it.
    """
    kinds = [degenerate(answer.text) for answer in answers]
    count = dict(Counter(kind for kind in kinds if kind is not None))
    if not count:
        return count
    first = next(answer.text for answer, kind in zip(answers, kinds, strict=True) if kind is not None)
    kinds_named = ", ".join(f"{number} {kind}" for kind, number in sorted(count.items()))
    found = (
        f"{sum(count.values())} of {len(answers)} answers that the model wrote itself for calibration say nothing "
        f"({kinds_named}), as {first[:60]!r}"
    )
    if 2 * sum(count.values()) > len(answers) and spec.degenerate == REFUSE:
        raise ValueError(
            f"{found}: it cannot calibrate itself; take calibration=photographs, noise or dataset:PATH, or these "
            "answers all the same with calibration=self:degenerate=allow"
        )
    logger.warning(found)
    return count


def wording(text: str, dialect: Dialect) -> str | None:
    """Return the question or expression in what a model wrote when asked for one.

    Args:
        text: What it wrote.
        dialect: Of the model.

    Returns:
        The first line without quotation marks; None where it has no words, more than `LONGEST_QUESTION` of them, or
        a box.
    """
    line = next((line for line in text.splitlines() if line.strip()), "").strip().strip("\"'`*“”").strip()
    words = line.split()
    side = (100, 100)
    if dialect.parse(line, original_size=side, model_size=side).count or not re.search(r"[^\W\d_]{2}", line):
        return None
    return line if len(words) <= LONGEST_QUESTION else None


def _asking(sample: CalibrationSample, asked: str | None) -> CalibrationSample:
    if asked is None:
        return sample
    if sample.wanted == "expression":
        return sample._replace(expression=asked.rstrip("."))
    return sample._replace(expression=None, prompt=asked)


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
        model_size=model_size(batch, processor),
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
    journal: Journal | None = None,
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
        journal: Remembers what the model wrote; None forgets it.

    Returns:
        Keyword arguments for the model, and the account of them.

    Raises:
        ValueError: `by_role`, and a sample holds no position for its image or for its answer; or most of what the model
            wrote itself says nothing.
    """
    writer = Writer(model, processor, dialect, journal)
    digest = hashlib.sha256()
    batches: list[dict[str, Any]] = []
    tokens = 0
    for drawn in tqdm(samples, desc="Preparing calibration samples", leave=False, disable=None):
        if spec.tokens is not None and tokens >= spec.tokens:
            break
        sample = writer.complete(drawn)
        prompt, answer = question(sample, dialect), written_answer(sample, dialect, processor)
        for part in (str(sample.image.size), sample.image.tobytes(), prompt, answer):
            digest.update(part if isinstance(part, bytes) else part.encode())
            digest.update(b"\0")
        image = shown(sample, dialect, processor)
        batch = answered(model, processor, image, prompt, answer)
        if by_role:
            batch[TOKEN_ROLES] = token_roles(batch, encode(processor, image, prompt), model.config)
        batches.append(to_model(batch, model) | {"use_cache": False})
        tokens += batch["input_ids"].shape[1]
    if spec.tokens is not None and tokens < spec.tokens:
        hold = "holds" if len(batches) == 1 else "hold"
        logger.warning(
            f"{counted(len(batches), 'calibration sample')} {hold} {counted(tokens, 'token')}, fewer than the "
            f"{spec.tokens} asked for; "
            "raise calibration_samples to get them"
        )
    if not keep_logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        batches = [batch | {"logits_to_keep": 1} for batch in batches]
    report = CalibrationReport(
        str(spec),
        len(batches),
        tokens,
        spec.seed,
        digest.hexdigest(),
        spec.force,
        writer.own,
        len(writer.answers),
        expect_answers(writer.answers, spec),
        sum(not answer.finished for answer in writer.answers),
    )
    return batches, report


def fingerprint(batches: Sequence[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of everything that the model is given."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(key.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


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


def model_size(batch: dict[str, Any], processor: Any) -> tuple[int, int]:
    """Return (width, height) in pixels of the image as the model sees it."""
    if "image_grid_thw" in batch:
        _, rows, columns = batch["image_grid_thw"][0].tolist()
        patch = processor.image_processor.patch_size
        return columns * patch, rows * patch
    height, width = batch["pixel_values"].shape[-2:]
    return width, height
