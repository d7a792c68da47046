"""Trial questions: a question about drawn pictures, whose answers separate causes of a difference between two engines.

A picture of one colour stays the same however it is resized, so an engine that resizes pictures in another way, or
twice, differs on fine patterns alone. Pictures of several sizes show limits of pixels by their numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from lmms_plugin.vlm.contracts.engine import Answer
from lmms_plugin.vlm.contracts.requests import Job, Messages, Request
from lmms_plugin.vlm.contracts.settings import GenerationSettings

_QUESTION = "What is in this picture?"
_SETTINGS = GenerationSettings(max_new_tokens=4)
_PERIOD = 7
"""Pixels of one square of the pattern: odd, so that no common factor of resizing keeps it."""


def _flat(colour: tuple[int, int, int], size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


def _fine(size: tuple[int, int]) -> Image.Image:
    """Return a pattern of squares over a gradient; it has detail at every scale that resizing can lose."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    squares = ((x // _PERIOD + y // _PERIOD) % 2) * 160
    channels = [squares + 90 * x // width, squares + 90 * y // height, 250 - squares]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "flat grey": lambda: _flat((96, 96, 96), (320, 240)),
    "flat red": lambda: _flat((200, 60, 40), (320, 240)),
    "fine small": lambda: _fine((70, 52)),
    "fine": lambda: _fine((320, 240)),
    "fine large": lambda: _fine((960, 720)),
}


def trial_jobs() -> list[Job]:
    """Return one job per picture, in order."""
    return [_job(name, draw) for name, draw in PICTURES.items()]


def _job(name: str, draw: Callable[[], Image.Image]) -> Job:
    def messages(_: Any = None) -> Messages:
        content = [{"type": "image", "url": draw()}, {"type": "text", "text": _QUESTION}]
        return [{"role": "user", "content": content, "log_probabilities": True}]

    request = Request(f"trial question, {name}", ("", 0), {}, None, 0, None, lambda: None, messages, lambda: None)
    return Job(messages, request, _SETTINGS)


def told(answers: Iterable[tuple[int, Answer]]) -> dict[str, dict[str, Any]]:
    """Return what is kept of the answers: name of the picture → trace, texts of tokens and log-probabilities."""
    names = list(PICTURES)
    found = {}
    for index, answer in answers:
        trace, tokens = answer.generated.trace, answer.generated.tokens
        found[names[index]] = {
            "trace": None if trace is None else trace.without_ids().written_out(),
            "tokens": [token.text for token in tokens],
            "logprobs": [None if np.isnan(token.logprob) else round(token.logprob, 6) for token in tokens],
        }
    return {name: found[name] for name in names}
