"""Prompts: a task's messages in the form that a Hugging Face processor takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lmms_plugin.protocol.dialects import Dialect, Frame
from lmms_plugin.protocol.plain_prompts import PlainTemplate
from lmms_plugin.protocol.response import Size
from lmms_plugin.utils import images

Message = dict[str, Any]
Colour = tuple[int, int, int]


class RequestError(ValueError):
    """Error for a request that cannot be answered; the message names its task and document."""


class Grounding(NamedTuple):
    """Request of a task for a box and for log-probabilities with the answer.

    Attributes:
        expression: Expression to locate.
        original_size: (width, height) of the image in pixels as the dataset has it.
        digits: Whether to return, for tokens of digits, the probabilities of the others.
    """

    expression: str
    original_size: Size
    digits: bool = False


@dataclass(frozen=True)
class Prompt:
    """Conversation that a model is to continue.

    Attributes:
        name: Task and document, for messages to the user.
        messages: Role and content as chat templates take them, every image decoded, upright and RGB, videos as paths.
        grounding: Request for a box; None for other requests.
        log_probabilities: Whether log-probabilities are returned with an answer that is no box.
        raw: Whether to pass the text unchanged, without chat template.
    """

    name: str
    messages: tuple[Message, ...]
    grounding: Grounding | None = None
    raw: bool = False
    log_probabilities: bool = False

    @property
    def wants_confidence(self) -> bool:
        """Return whether the answer must include the evidence for confidence estimates."""
        return self.grounding is not None or self.log_probabilities

    @property
    def images(self) -> list[Image.Image]:
        """Return all images, in order."""
        return [part["image"] for part in self._parts("image")]

    @property
    def videos(self) -> list[str]:
        """Return the paths of all videos, in order."""
        return [part["video"] for part in self._parts("video")]

    @property
    def text(self) -> str:
        """Return all text, one line per part."""
        return "\n".join(part["text"] for part in self._parts("text"))

    @property
    def last_words(self) -> str:
        """Return the last text that is not empty, stripped of white space; "" if there is none."""
        texts = (part["text"].strip() for part in self._parts("text"))
        return next((text for text in reversed(list(texts)) if text), "")

    def _parts(self, kind: str) -> Iterator[dict[str, Any]]:
        return (part for message in self.messages for part in message["content"] if part["type"] == kind)


@dataclass(frozen=True)
class PromptReader:
    """Converter from a task's messages to prompts for one model.

    Attributes:
        dialect: Dialect in which the model is asked for a box.
        system_prompt: System prompt that replaces the task's own, if any; None keeps it.
        background: Colour around an image that the dialect wants padded to a square.
        raw: Whether the model has no chat template at all.
        plain: Templates by which such a model is asked; None keeps a task's own words.
    """

    dialect: Dialect
    system_prompt: str | None = None
    background: Colour = (127, 127, 127)
    raw: bool = False
    plain: PlainTemplate | None = None

    def read(self, messages: Sequence[Mapping[str, Any]], name: str) -> Prompt:
        """Convert the messages of one document.

        A message with the key "grounding" keeps its images and gets the dialect's question as its text. One with
        "log_probabilities" is asked unchanged.

        Raises:
            RequestError: An image cannot be decoded, or a part is of a kind that is not supported.
        """
        wishes = [message["grounding"] for message in messages if message.get("grounding") is not None]
        if len(wishes) > 1:
            raise RequestError(f"{name}: {len(wishes)} messages ask for a box, at most one can")
        conversation = [self._message(message, name) for message in messages]
        if self.system_prompt:
            system = {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            conversation = [system, *(message for message in conversation if message["role"] != "system")]
        if self.plain is not None:
            conversation = [_in_words_of(self.plain, conversation, name)]
        grounding = _grounding(wishes[0], name) if wishes else None
        raw = self.raw or (grounding is not None and self.dialect.raw_prompt)
        log_probabilities = any(message.get("log_probabilities") for message in messages)
        prompt = Prompt(name, tuple(conversation), grounding, raw, log_probabilities)
        if grounding is not None and len(prompt.images) != 1:
            raise RequestError(f"{name}: a box can be asked for in exactly one image, got {len(prompt.images)}")
        return prompt

    def _message(self, message: Mapping[str, Any], name: str) -> Message:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read = [_part(part, name) for part in parts]
        wish = message.get("grounding")
        if wish is not None:
            images = [self._framed(part) for part in read if part["type"] == "image"]
            read = [*images, {"type": "text", "text": self.dialect.ask(_grounding(wish, name).expression)}]
        return {"role": message["role"], "content": read}

    def _framed(self, part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": framed(part["image"], self.dialect, self.background)}


def _in_words_of(plain: PlainTemplate, conversation: Sequence[Message], name: str) -> Message:
    if any(message["role"] != "user" for message in conversation):
        roles = ", ".join(message["role"] for message in conversation)
        raise RequestError(f"{name}: a model without chat template is asked one question in one turn, got {roles}")
    parts = [part for message in conversation for part in message["content"]]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    shown = [part for part in parts if part["type"] != "text"]
    return {"role": "user", "content": [*shown, {"type": "text", "text": plain.write(text)}]}


def _grounding(wish: Mapping[str, Any], name: str) -> Grounding:
    try:
        width, height = wish["original_size"]
        return Grounding(str(wish["expression"]), (int(width), int(height)), bool(wish.get("digits", False)))
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{name}: 'grounding' must be {{'expression': ..., 'original_size': [width, height]}}, got {wish!r}"
        ) from error


def _part(part: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", "image": _image(part["url"], name)}
    if kind == "video":
        return {"type": "video", "video": _video(part, name)}
    raise RequestError(f"{name}: {kind} is not supported, only text, images and video are")


def _image(source: Any, name: str) -> Image.Image:
    with naming(name, "its image cannot be decoded"):
        if not isinstance(source, str | Path | Image.Image):
            raise RequestError(f"{name}: an image must be a PIL image or a path, got {type(source).__name__}")
        # Not copied where nothing changes: questions about one image then share one object.
        return images.opened(source)


def _video(part: Mapping[str, Any], name: str) -> str:
    source = part["url"]
    if isinstance(source, Mapping):
        source = source.get("path", source.get("url"))
    if not isinstance(source, str | Path):
        raise RequestError(f"{name}: a video must be given as a path, got {type(source).__name__}")
    if part.get("start_time") is not None or part.get("end_time") is not None:
        raise RequestError(f"{name}: parts of a video (start_time, end_time) are not supported")
    return str(source)


@contextmanager
def naming(name: str, problem: str, *more: type[Exception]) -> Iterator[None]:
    """Name task and document in the errors of undecodable files (for a broken PNG, Pillow's is a SyntaxError).

    Truncated images are errors like any other damage, also where a task's own code decodes them.
    """
    damage: tuple[type[Exception], ...] = (
        *(images.ImageError, OSError, SyntaxError, Image.DecompressionBombError),
        *more,
    )
    with images.strict():
        try:
            yield
        except damage as error:
            raise RequestError(f"{name}: {problem}: {error}") from error


def mean_colour(processor: Any) -> Colour:
    """Return the image processor's mean colour, which it normalises to zeros; one number is for all channels."""
    mean = getattr(processor.image_processor, "image_mean", None)
    red, green, blue = np.broadcast_to(0.5 if mean is None else mean, 3).tolist()
    return int(red * 255), int(green * 255), int(blue * 255)


def placeholder(processor: Any) -> str:
    """Return an image's placeholder in a prompt without chat template; nothing where the processor adds it itself."""
    token = getattr(processor, "image_token", "")
    token = str(getattr(token, "content", token))
    lay_out = getattr(processor, "prepare_inputs_layout", None)
    if not token or lay_out is None:
        return token
    grey = Image.new("RGB", (32, 32), (127, 127, 127))
    try:
        texts = lay_out(images=[[grey]], text=[f"{token}?"])[1]
    except (TypeError, ValueError, LookupError, AttributeError):
        # It takes more than images and texts, and its tokens are unknown.
        return token
    return token if texts[0].count(token) == 1 else ""


def framed(image: Image.Image, dialect: Dialect, background: Colour) -> Image.Image:
    """Return the image as the dialect needs it: on a square if its boxes refer to one."""
    return pad_to_square(image, background) if dialect.frame is Frame.PADDED else image


def pad_to_square(image: Image.Image, background: Colour) -> Image.Image:
    """Pad an image to a centred square on its longer side; the odd pixel goes to the right or the bottom."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
