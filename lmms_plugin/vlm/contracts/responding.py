"""What lmms-eval asks of a model, whether the model writes or only compares images with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.requests import Request


@dataclass
class Usage:
    """What was spent so far.

    Attributes:
        tokens: generated or scored.
        seconds: from the first job of a call to its last result.
    """

    tokens: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second; 0 before anything was done."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Responder(Protocol):
    """Responds to lmms-eval's requests in their order."""

    usage: Usage

    @property
    def batch_size(self) -> int:
        """Images that go through the model together."""

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request once.

        Returns:
            Texts. An answer to a message with the key "grounding" or "log_probabilities" is an encoded `Response`, and
            so are the scores where the generation options say `candidates`; any other is the plain text.

        Raises:
            RequestError: a document cannot be read or shown to this model; it is named.
            OutOfMemory: a batch does not fit; says what helps.
        """

    def generate_rounds(self, requests: Sequence[Request]) -> list[list[str]]:
        """Answer requests that ask again with earlier answers at hand, all of them one round at a time.

        Returns:
            For each request the answers of its rounds.
        """

    def scores(self, requests: Sequence[Request]) -> list[ContinuationScore]:
        """Return the log-probabilities of every request's continuation, token by token."""
