"""Whether a server makes of a prompt what the checkpoint's own processor makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from loguru import logger

from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.protocol.response import Size
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.generation.token_texts import decode

FIRST = 32
"""Prompts of a run that are compared id by id; later ones by their number of tokens."""
_SHOWN = 6


class ExpectedPrompt(NamedTuple):
    """A prompt as the checkpoint's processor makes it.

    Attributes:
        length: in tokens, images included.
        ids: of them; None where only the length was computed.
        model_size: (width, height) in pixels of its only image as the model sees it; None if unknown.
    """

    length: int
    ids: tuple[int, ...] | None
    model_size: Size | None


@dataclass
class PromptCheck:
    """Compares prompts.

    Attributes:
        chat: the checkpoint's processor.
        stops: whether a difference ends the run.
        checked: prompts of which the server told ids or their number.
        unchecked: prompts of which it told neither.
        differing: prompts that differ.
        by_ids: whether ids were compared, and not only their number.
    """

    chat: Chat
    stops: bool = True
    checked: int = 0
    unchecked: int = 0
    differing: int = 0
    by_ids: bool = False
    _known: dict[tuple[tuple[int, int], ...], tuple[int, Size | None]] = field(default_factory=dict, init=False)
    _made: int = field(default=0, init=False)
    _lock: Any = field(default_factory=Lock, init=False, repr=False)

    def expected(self, prompt: Prompt) -> ExpectedPrompt:
        """Return what the processor makes of a prompt; images of one size take as many tokens each time.

        Raises:
            RequestError: the processor refuses it.
        """
        sizes = tuple(image.size for image in prompt.images)
        if sizes in self._known and self._made >= FIRST:
            tokens, size = self._known[sizes]
            return ExpectedPrompt(len(self.chat.ids(self.chat.text_of(prompt))) + tokens, None, size)
        return self._encoded(prompt)

    def _encoded(self, prompt: Prompt) -> ExpectedPrompt:
        batch = self.chat.encode([prompt])
        ids = tuple(batch.inputs["input_ids"][0].tolist())
        size = batch.model_sizes[0]
        text = len(self.chat.ids(self.chat.text_of(prompt)))
        self._known[tuple(image.size for image in prompt.images)] = (len(ids) - text, size)
        self._made += 1
        return ExpectedPrompt(len(ids), ids, size)

    def agrees(
        self,
        prompt: Prompt,
        expected: ExpectedPrompt,
        response: Mapping[str, Any],
        answer: tuple[int, ...] = (),
    ) -> bool:
        """Compare with what a server says that it read.

        Args:
            prompt: that was sent.
            expected: what our processor makes of it.
            response: of the server.
            answer: ids of what was sent behind the prompt.

        Raises:
            RequestError: it read something else, and that is to end the run.
        """
        ids, count = _told(response)
        if ids is None and count is None:
            return True
        length = len(ids) if ids is not None else count
        if length == expected.length + len(answer) and None in (ids, expected.ids):
            return True
        # The length alone may rest on an image of the same size; the difference is shown on the whole.
        ours = expected.ids if expected.ids is not None else self._encoded(prompt).ids
        assert ours is not None
        ours += answer
        if ids == ours or (ids is None and count == len(ours)):
            return True
        problem = f"{prompt.name}: {self._difference(ours, ids, count)}"
        if self.stops:
            raise RequestError(f"{problem}; mismatch=warn goes on all the same")
        with self._lock:
            if not self.differing:
                logger.warning("{}; mismatch=warn: the run goes on, and its results say so", problem)
        return False

    def note(self, compared: str | None, *, agrees: bool) -> None:
        """Count a prompt that was compared by its `ids`, their `number`, or not at all."""
        with self._lock:
            self.by_ids |= compared == "ids"
            self.checked += compared is not None
            self.unchecked += compared is None
            self.differing += not agrees

    @staticmethod
    def compares(response: Mapping[str, Any]) -> str | None:
        """Return what a server tells of the prompt: `ids`, their `number`, or nothing."""
        ids, count = _told(response)
        return "ids" if ids is not None else "number" if count is not None else None

    def _difference(self, ours: tuple[int, ...], theirs: tuple[int, ...] | None, count: int | None) -> str:
        name = type(self.chat.processor).__name__
        read = len(theirs) if theirs is not None else count
        said = f"the server read {read} tokens, {name} makes {len(ours)}"
        if theirs is not None:
            shortest = min(len(ours), len(theirs))
            at = next((i for i in range(shortest) if ours[i] != theirs[i]), shortest)
            said += (
                f"; from token {at} on the server has {self._shown(theirs, at)}, the processor {self._shown(ours, at)}"
            )
        return (
            f"{said}: expected the same chat template, pixel limits and image tokens, so pretrained= must be what is "
            "served"
        )

    def _shown(self, ids: tuple[int, ...], at: int) -> str:
        part = [index for index in ids[at : at + _SHOWN] if index < len(self.chat.tokenizer)]
        return repr(decode(self.chat.tokenizer, part)) if part else "nothing"


def _told(response: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, int | None]:
    """Ids of the prompt's tokens and their number, None for what a server does not tell."""
    ids = response.get("prompt_token_ids")
    told = tuple(ids) if isinstance(ids, list) and ids else None
    return told, counted(response, "prompt_tokens")


def counted(response: Mapping[str, Any], what: str) -> int | None:
    """Return how many tokens a server counts (`prompt_tokens`, `completion_tokens`); None where it does not."""
    usage = response.get("usage")
    count = usage.get(what) if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) and count > 0 else None
