"""Engine interface: answers to prompts from a model that is loaded in this process or served elsewhere.

An `Engine` takes jobs and yields one record per job, an `Answer` or a `ContinuationScore`. Requests (`jobs`) and the
strings returned to lmms-eval (`assembling`) are the same for every engine.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lmms_plugin.protocol.prompts import Prompt
from lmms_plugin.protocol.response import Size, Token
from lmms_plugin.protocol.traces import Trace
from lmms_plugin.vlm.contracts.requests import Job


class Generated(NamedTuple):
    """Output of a model.

    Attributes:
        tokens: Tokens, with the end-of-sequence token, if the model reached it, as the last; cut where `until` says.
            Their log-probabilities are NaN where there are none: after a beam search, and from some servers.
        text: Answer without special tokens, except those that separate reasoning and answer.
        ids: Ids of all generated tokens, uncut.
        trace: Tokens of the prompt and of the answer; None where they are not known.
    """

    tokens: tuple[Token, ...]
    text: str
    ids: tuple[int, ...]
    trace: Trace | None = None


class ContinuationScore(NamedTuple):
    """Score of a given continuation.

    Attributes:
        logprobs: Natural log-probability of each of its tokens.
        is_greedy: Whether greedy decoding would have produced it.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Return the log-probability of the whole continuation."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class Answer:
    """Answer of an engine to one prompt.

    Attributes:
        prompt: Prompt as it was asked.
        generated: Tokens with log-probabilities, and alternatives where the prompt requests those of digits.
        model_size: (width, height) in pixels of the prompt's only image as the model saw it; None if unknown.
        opened: Tag of a reasoning block that the prompt's end opened; "" if none, or if the prompt wants no confidence.
        confidence: Estimator -> confidence in [0, 1] that only the engine can compute (a learned confidence).
        samples: Further answers sampled for the prompt; None where there are none.
        records_digits: Whether alternatives of digits were recorded if the prompt wants them.
    """

    prompt: Prompt
    generated: Generated
    model_size: Size | None = None
    opened: str = ""
    confidence: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Generated, ...] | None = None
    records_digits: bool = True


@dataclass(frozen=True)
class Traits:
    """Properties common to all answers of an engine.

    Attributes:
        silent: Texts of special tokens, which are no part of an answer in words.
        answer_marks: Texts of special tokens around the answer proper.
        image_reader: Name of what resizes images for the model, for messages to the user.
    """

    silent: frozenset[str]
    answer_marks: frozenset[str]
    image_reader: str


class Engine(Protocol):
    """Executor of jobs: it runs jobs about one image together, and yields results as they are done."""

    @property
    def traits(self) -> Traits:
        """Return the properties common to all its answers."""

    @property
    def batch_size(self) -> int:
        """Return the number of images answered together."""

    def answers(self, jobs: Sequence[Job], *, evidence: bool = True) -> Generator[tuple[int, Answer]]:
        """Yield the index of a job with its answer.

        Args:
            jobs: Jobs to answer.
            evidence: Whether to gather, for prompts that request it, further evidence for confidence estimates besides
                log-probabilities: alternatives of digits, samples, a learned confidence.

        Raises:
            RequestError: A document cannot be read or shown to this model; it is named.
            OutOfMemory: A batch does not fit; the message says what helps.
        """

    def scores(self, jobs: Sequence[Job]) -> Generator[tuple[int, ContinuationScore]]:
        """Yield the index of a job with the score of its request's continuation.

        Raises:
            RequestError: As in `answers`.
            OutOfMemory: As in `answers`.
        """

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens added."""
