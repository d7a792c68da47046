"""Conversion of an engine's answers into the strings that lmms-eval gets: plain text, or an encoded `Response`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loguru import logger

from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.protocol.reasoning import REMEDY
from lmms_plugin.protocol.response import Response
from lmms_plugin.protocol.traces import Trace
from lmms_plugin.vlm.contracts.engine import Answer, Generated, Traits


def read(answer: Answer, traits: Traits) -> Response:
    """Return the answer with its tokens and the reasoning tag that the prompt opened, without anything else.

    Tokens without log-probabilities are left out: their text alone is the answer.
    """
    tokens = answer.generated.tokens
    if answer.prompt.grounding is None:
        tokens = tuple(token._replace(text="") if token.text in traits.silent else token for token in tokens)
    judged = not any(math.isnan(token.logprob) for token in tokens)
    return Response("".join(token.text for token in tokens), tokens if judged else (), opened=answer.opened)


def encoded_scores(scores: Mapping[str, tuple[float | None, ...]]) -> str:
    """Encode the scores of a request's candidates as a `Response` without text."""
    return Response("", scores=scores).encode()


@dataclass
class Assembler:
    """Converter from the answers of one engine to responses.

    Attributes:
        traits: Traits of the engine.
        dialect: Dialect in which the model is asked for boxes.
        model: Name by which the user called the model, for warnings.
        warns: Whether this process logs; each warning appears once.
        facts: Facts about the engine, which travel with one answer of each task.
        keeps_ids: Whether the ids of prompts travel with answers, and not only their number and digest.
        spell: Function from a token's id to its text, for the ids that are kept.
    """

    traits: Traits
    dialect: Dialect
    model: str
    warns: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    keeps_ids: bool = False
    spell: Callable[[int], str] = str
    _warned: set[str] = field(default_factory=set, init=False)

    def plain(self, answer: Answer) -> str:
        """Return the text for one of lmms-eval's own tasks: with reasoning, which its `--reasoning_tags` remove."""
        text = answer.generated.text
        for mark in self.traits.answer_marks:
            text = text.replace(mark, "")
        return text

    def response(self, answer: Answer) -> Response:
        """Return the answer with everything that confidence is estimated from.

        Raises:
            RequestError: The size that boxes refer to is not known.
        """
        prompt = answer.prompt
        samples = None if answer.samples is None else tuple(_raw(prompt, sample) for sample in answer.samples)
        response = replace(
            read(answer, self.traits),
            model_size=answer.model_size,
            confidence=answer.confidence,
            samples=samples,
            trace=self._trace(answer.generated),
        )
        self._warn_if_unfinished(response)
        if prompt.grounding is None:
            return response
        self._warn_if_unpublished()
        if self.dialect.requires_model_size and answer.model_size is None:
            raise RequestError(
                f"{prompt.name}: dialect {self.dialect.name!r} counts pixels of the resized image, and "
                f"{self.traits.image_reader} does not tell its size"
            )
        size, digits = prompt.grounding.original_size, prompt.grounding.digits and answer.records_digits
        return replace(response, original_size=size, dialect=self.dialect.name, records_digits=digits)

    def _trace(self, generated: Generated) -> Trace | None:
        return generated.trace if generated.trace is None or self.keeps_ids else generated.trace.without_ids()

    def _warn_if_unfinished(self, response: Response) -> None:
        if not response.parts.finished:
            self._warn(f"{self.model}: an answer ends inside its reasoning, {REMEDY}")

    def _warn_if_unpublished(self) -> None:
        if not self.dialect.published:
            self._warn(
                f"{self.model} publishes no way to ask for a box: it is asked in generic words (dialect "
                f"{self.dialect.name!r}), and a low accuracy says nothing about quantization"
            )

    def _warn(self, message: str) -> None:
        if self.warns and message not in self._warned:
            logger.warning("{}", message)
            self._warned.add(message)


def _raw(prompt: Prompt, generated: Generated) -> str:
    """Return the answer as its task reads it: with special tokens, which may be coordinates, if a box is requested."""
    return generated.text if prompt.grounding is None else "".join(token.text for token in generated.tokens)
