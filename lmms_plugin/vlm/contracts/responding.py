"""Responder interface: what lmms-eval needs of a model, whether it generates text or only scores captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.requests import Request


@dataclass
class Usage:
    """Tokens and time spent so far.

    Attributes:
        tokens: Number of tokens, generated or scored.
        seconds: Time from the first job of a call to its last result.
    """

    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Return tokens per second; 0 before anything was done."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Responder(Protocol):
    """Responder to lmms-eval's requests, in their order."""

    usage: Usage

    @property
    def batch_size(self) -> int:
        """Return the number of images that go through the model together."""

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request once.

        Returns:
            Texts. An answer to a message with the key "grounding" or "log_probabilities" is an encoded `Response`, and
            so are the scores where the generation options say `candidates`; any other is the plain text.

        Raises:
            RequestError: A document cannot be read or shown to this model; it is named.
            OutOfMemory: A batch does not fit; the message says what helps.
        """

    def generate_rounds(self, requests: Sequence[Request]) -> list[list[str]]:
        """Answer multi-round requests, whose rounds see the earlier answers; all requests one round at a time.

        Returns:
            Answers of its rounds, for each request.
        """

    def scores(self, requests: Sequence[Request]) -> list[ContinuationScore]:
        """Return the log-probabilities of every request's continuation, token by token."""
