"""What answers prompts: one interface, whether the model is loaded in this process or served elsewhere.

An `Engine` takes jobs and gives records, an `Answer` or a `ContinuationScore` each. What lmms-eval asks (`jobs`) and
the string that it gets back (`assembling`) are the same for every engine.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lmms_plugin.protocol.prompts import Prompt
from lmms_plugin.protocol.response import Size, Token
from lmms_plugin.vlm.contracts.requests import Job


class Generated(NamedTuple):
    """What a model wrote.

    Attributes:
        tokens: with the end-of-sequence token, if the model came to it, as the last; cut where `until` says.
            Their log-probabilities are NaN where there are none: after a beam search, and of some servers.
        text: the answer without special tokens, but for those that part reasoning and answer.
        ids: of all tokens that were generated, uncut.
    """

    tokens: tuple[Token, ...]
    text: str
    ids: tuple[int, ...]


class ContinuationScore(NamedTuple):
    """How a model judges a given continuation.

    Attributes:
        logprobs: natural logarithm of the probability of each of its tokens.
        is_greedy: whether greedy decoding would have produced it.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class Answer:
    """What an engine answered to one prompt.

    Attributes:
        prompt: as it was asked.
        generated: tokens with log-probabilities, and alternatives where the prompt wants those of digits.
        model_size: (width, height) in pixels of the prompt's only image as the model saw it; None if unknown.
        opened: the tag of a reasoning that the prompt's end opened; "" if none, or the prompt wants no confidence.
        confidence: by estimator, what only the engine can tell (a learned confidence), in [0, 1].
        samples: further answers that were drawn for the prompt; None where none were.
        records_digits: whether alternatives of digits were recorded if the prompt wants them.
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
    """What all answers of an engine have in common.

    Attributes:
        silent: texts of special tokens, which are no part of an answer in words.
        answer_marks: texts of special tokens around the answer proper.
        image_reader: what resizes images for the model, for messages to the user.
    """

    silent: frozenset[str]
    answer_marks: frozenset[str]
    image_reader: str


class Engine(Protocol):
    """Brings jobs to a model, those about one image together, and yields results as they are done."""

    @property
    def traits(self) -> Traits:
        """What all its answers have in common."""

    @property
    def batch_size(self) -> int:
        """Images answered together."""

    def answers(self, jobs: Sequence[Job], *, evidence: bool = True) -> Generator[tuple[int, Answer]]:
        """Yield the index of a job with its answer.

        Args:
            jobs: what to answer.
            evidence: whether to gather, for prompts that want it, what confidence is estimated from besides
                log-probabilities: alternatives of digits, samples, a learned confidence.

        Raises:
            RequestError: a document cannot be read or shown to this model; it is named.
            OutOfMemory: a batch does not fit; says what helps.
        """

    def scores(self, jobs: Sequence[Job]) -> Generator[tuple[int, ContinuationScore]]:
        """Yield the index of a job with the score of its request's continuation.

        Raises:
            RequestError, OutOfMemory: as `answers`.
        """

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text takes, nothing added."""
