"""An answer with its tokens' log-probabilities, and the string in which lmms-eval carries it from model to task.

lmms-eval hands a task nothing but the answer's text: response cache, filters and sample logs know strings only. So what
a task needs beyond the text travels behind it, after a marker, as one line of JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

MARKER = "<|lmms_plugin|>"
Size = tuple[int, int]

_FIELDS = {"tokens", "logprobs", "original_size", "model_size", "dialect"}


class Token(NamedTuple):
    """A generated token.

    Attributes:
        text: its share of the answer's text; "" for the end-of-sequence token, and for all but the last of several
            tokens that make one character.
        logprob: natural logarithm of its probability in the model's own distribution (before temperature, penalties
            and truncation of the sampling), at most 0.
    """

    text: str
    logprob: float


@dataclass(frozen=True)
class Response:
    """What a model answered to a grounding question.

    Attributes:
        text: the raw answer, special tokens included. Where there are tokens it is their concatenated text.
        tokens: the generated tokens, the end-of-sequence token included; empty where the model does not tell.
        original_size: (width, height) of the image in pixels as the dataset has it; None if unknown.
        model_size: (width, height) of the image in pixels as the model saw it; None if unknown.
        dialect: name of the `Dialect` that the question was asked in; None if the model was asked in the task's words.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    original_size: Size | None = None
    model_size: Size | None = None
    dialect: str | None = None

    def __post_init__(self) -> None:
        written = "".join(token.text for token in self.tokens)
        if self.tokens and written != self.text:
            raise ValueError(f"The tokens' texts must add up to the answer {self.text!r}, got {written!r}")

    def encode(self) -> str:
        """Return the answer with its trailer.

        Log-probabilities are rounded to six decimals.

        Raises:
            ValueError: a log-probability is not finite.
        """
        trailer = {
            "tokens": [token.text for token in self.tokens],
            "logprobs": [round(token.logprob, 6) for token in self.tokens],
            "original_size": self.original_size,
            "model_size": self.model_size,
            "dialect": self.dialect,
        }
        line = json.dumps(trailer, separators=(",", ":"), allow_nan=False)
        # The last marker in the string must be the one written here, whatever the model wrote.
        return f"{self.text}\n{MARKER}" + line.replace("<", "\\u003c")

    @classmethod
    def decode(cls, answer: str) -> Response:
        """Read what `encode` wrote; lmms-eval strips white space from both ends on the way, which does no harm.

        An answer without the marker comes from a model that is not ours: it decodes to its text alone.

        Raises:
            ValueError: there is a marker and what follows it is not a trailer.
        """
        text, marker, line = answer.rpartition(MARKER)
        if not marker:
            return cls(text=answer)
        try:
            trailer = json.loads(line)
            if not isinstance(trailer, dict) or set(trailer) != _FIELDS:
                raise ValueError(f"expected an object with {sorted(_FIELDS)}")
            pairs = zip(trailer["tokens"], trailer["logprobs"], strict=True)
            tokens = tuple(_token(text, logprob) for text, logprob in pairs)
            sizes = {name: _size(trailer[name]) for name in ("original_size", "model_size")}
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The trailer of an answer is damaged ({error}): {line[:200]!r}") from error
        written = "".join(token.text for token in tokens) if tokens else text.removesuffix("\n")
        return cls(text=written, tokens=tokens, dialect=_name(trailer["dialect"]), **sizes)


def _token(text: Any, logprob: Any) -> Token:
    number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if not (isinstance(text, str) and number and math.isfinite(logprob)):
        raise ValueError(f"expected a text and a finite number for each token, got {text!r}, {logprob!r}")
    return Token(text, float(logprob))


def _size(value: Any) -> Size | None:
    if value is None:
        return None
    width, height = value
    if not (isinstance(width, int) and isinstance(height, int)):
        raise ValueError(f"expected a size as [width, height] in pixels, got {value!r}")
    return width, height


def _name(value: Any) -> str | None:
    return None if value is None else str(value)
