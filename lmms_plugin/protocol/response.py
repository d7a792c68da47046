"""Response: an answer with its tokens' log-probabilities, and the string in which lmms-eval carries it to the task.

lmms-eval passes a task nothing but the answer's text: response cache, filters and sample logs know strings only. So
everything else that a task needs follows the text, after a marker, as one line of JSON.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from lmms_plugin.protocol.reasoning import Separated, expect_opening, separate
from lmms_plugin.protocol.traces import Trace

MARKER = "<|lmms_plugin|>"
Size = tuple[int, int]

FIELDS = {"tokens", "logprobs", "original_size", "model_size", "dialect"}
OPTIONAL_FIELDS = {"confidence", "digits", "samples", "statement", "scores", "opened", "trace", "engine", "forced"}


class Alternatives(NamedTuple):
    """Alternatives to a generated token of digits.

    Attributes:
        probabilities: Digits -> probability of the tokens with these digits and otherwise the chosen token's text; the
            likeliest ones, in decreasing order.
        unlisted: Probability of all other such tokens together. The remainder to 1 is that of tokens of another kind.
    """

    probabilities: Mapping[str, float]
    unlisted: float = 0.0


class Token(NamedTuple):
    """Generated token.

    Attributes:
        text: Share of the answer's text; "" for the end-of-sequence token, and for all but the last of several tokens
            that form one character.
        logprob: Natural log-probability in the model's own distribution (before temperature, penalties and truncation
            of the sampling), at most 0.
        alternatives: Alternatives to the token; None where it writes no digits or none were requested.
    """

    text: str
    logprob: float
    alternatives: Alternatives | None = None


class Spoken(NamedTuple):
    """Tokens of an answer without those of its reasoning.

    Attributes:
        tokens: Tokens, the end-of-sequence token included; () where reasoning does not end, or the model reports none.
        start: Position of the first token's text in the whole text, in characters.
    """

    tokens: tuple[Token, ...]
    start: int


class ForcedAnswer(NamedTuple):
    """Answer of a reference model that was forced through the model, token by token: both saw the same tokens before.

    Attributes:
        reference: Tokens of the reference's answer, with its own probabilities.
        model: The same tokens with the probabilities of the model.
        divergences: KL divergence of the model from the reference at each token, over the vocabulary, in nats.
        agreed: Whether both have the same likeliest token, for each.
    """

    reference: tuple[Token, ...]
    model: tuple[Token, ...]
    divergences: tuple[float, ...]
    agreed: tuple[bool, ...]


@dataclass(frozen=True)
class Response:
    """Answer of a model to a grounding question.

    Attributes:
        text: Raw answer, special tokens included. Where there are tokens it is their concatenated text.
        tokens: Generated tokens, the end-of-sequence token included; empty where the model reports none.
        original_size: (width, height) of the image in pixels as the dataset has it; None if unknown.
        model_size: (width, height) of the image in pixels as the model saw it; None if unknown.
        dialect: Name of the `Dialect` that the question was asked in; None if the model was asked in the task's words.
        confidence: Estimator -> confidence in [0, 1] that only the model's side can compute (a learned confidence).
        records_digits: Whether alternatives of the tokens were recorded, be there digits in the answer or not.
        samples: Raw answers sampled for the same question; None where none were requested.
        statement: The model's statement of its confidence; None where it was not asked.
        scores: Name -> scores of the candidates that were scored and not written, all of the same length, None for what
            was not computed: `logprob` of a caption in nats and its `tokens`, or a retrieval checkpoint's `itc`
            (cosine) and `itm` (logit).
        opened: Tag of a reasoning block that the prompt opened and the text continues; "" if none.
        trace: Tokens read and written; None where the engine does not tell.
        engine: Facts about the engine (see `lmms_plugin.vlm.engine_facts`); empty with all answers of a task but one.
        forced: Answer of a reference model, forced through this one; None without a reference.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    original_size: Size | None = None
    model_size: Size | None = None
    dialect: str | None = None
    confidence: Mapping[str, float] = field(default_factory=dict)
    records_digits: bool = False
    samples: tuple[str, ...] | None = None
    statement: str | None = None
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    opened: str = ""
    trace: Trace | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    forced: ForcedAnswer | None = None

    def __post_init__(self) -> None:
        if self.opened:
            expect_opening(self.opened)
        written = "".join(token.text for token in self.tokens)
        if self.tokens and written != self.text:
            raise ValueError(f"The tokens' texts must add up to the answer {self.text!r}, got {written!r}")

    @cached_property
    def parts(self) -> Separated:
        """Return the text separated into reasoning and answer."""
        return separate(self.text, self.opened)

    @property
    def answer(self) -> str:
        """Return the answer proper, without reasoning and the tags around it; "" where reasoning does not end."""
        return self.parts.answer_text

    @property
    def of_reference(self) -> tuple[Response, Response]:
        """Return the reference's answer with the reference's probabilities, and the same text with this model's.

        Raises:
            ValueError: No answer was forced.
        """
        if self.forced is None:
            raise ValueError("expected the answer of a reference model, got none: run with --model_args reference=none")
        text = "".join(token.text for token in self.forced.reference)
        common: dict[str, Any] = {"original_size": self.original_size, "model_size": self.model_size}
        common |= {"dialect": self.dialect, "opened": self.opened, "records_digits": self.records_digits}
        return Response(text, self.forced.reference, **common), Response(text, self.forced.model, **common)

    @property
    def sampled(self) -> tuple[str | None, ...] | None:
        """Return the sampled answers proper, None for one whose reasoning does not end; None without samples."""
        if self.samples is None:
            return None
        parts = (separate(sample, self.opened) for sample in self.samples)
        return tuple(part.answer_text if part.finished else None for part in parts)

    @property
    def stated(self) -> str | None:
        """Return the statement without reasoning, "" where that does not end; None where the model was not asked."""
        return None if self.statement is None else separate(self.statement, self.opened).answer_text

    @cached_property
    def spoken(self) -> Spoken:
        """Return the tokens of the answer without those of its reasoning. A token across the boundary counts."""
        if not self.parts.finished:
            return Spoken((), len(self.text))
        if not self.parts.reasoned:
            return Spoken(self.tokens, 0)
        edges = list(accumulate((len(token.text) for token in self.tokens), initial=0))
        first = bisect_right(edges, self.parts.said[0], lo=1) - 1
        # Tokens without text belong to the character that a later one completes, or end the answer.
        while first > 0 and not self.tokens[first - 1].text:
            first -= 1
        last = bisect_left(edges, self.parts.until) if self.parts.until < len(self.text) else len(self.tokens)
        return Spoken(self.tokens[first:last], edges[first])

    def encode(self) -> str:
        """Return the answer with its trailer.

        Log-probabilities and confidences are rounded to six decimals, alternatives to five.

        Raises:
            ValueError: A log-probability or a confidence is not finite.
        """
        trailer: dict[str, Any] = {
            "tokens": [token.text for token in self.tokens],
            "logprobs": [round(token.logprob, 6) for token in self.tokens],
            "original_size": self.original_size,
            "model_size": self.model_size,
            "dialect": self.dialect,
        }
        if self.confidence:
            trailer["confidence"] = {name: round(value, 6) for name, value in self.confidence.items()}
        if self.records_digits:
            trailer["digits"] = _digits(self.tokens)
        if self.samples is not None:
            trailer["samples"] = self.samples
        if self.statement is not None:
            trailer["statement"] = self.statement
        if self.scores:
            trailer["scores"] = {name: [_rounded(value) for value in row] for name, row in self.scores.items()}
        if self.opened:
            trailer["opened"] = self.opened
        if self.trace is not None:
            trailer["trace"] = self.trace.written_out()
        if self.engine:
            trailer["engine"] = dict(self.engine)
        if self.forced is not None:
            trailer["forced"] = _written_forced(self.forced)
        line = json.dumps(trailer, separators=(",", ":"), allow_nan=False)
        # The last marker in the string must be the one written here, whatever the model wrote.
        return f"{self.text}\n{MARKER}" + line.replace("<", "\\u003c")

    @classmethod
    def decode(cls, answer: str) -> Response:
        """Decode the result of `encode`; lmms-eval strips white space from both ends on the way, which does no harm.

        An answer without the marker comes from a model of another package: it decodes to its text alone.

        Raises:
            ValueError: There is a marker and what follows it is not a trailer.
        """
        text, marker, line = answer.rpartition(MARKER)
        if not marker:
            return cls(text=answer)
        try:
            trailer = json.loads(line)
            if not isinstance(trailer, dict) or set(trailer) - OPTIONAL_FIELDS != FIELDS:
                raise ValueError(f"expected an object with {sorted(FIELDS)}")
            tokens = _tokens(trailer["tokens"], trailer["logprobs"], trailer.get("digits", {}))
            sizes = {name: _size(trailer[name]) for name in ("original_size", "model_size")}
            confidence = {str(name): _share(value) for name, value in trailer.get("confidence", {}).items()}
            samples = _texts(trailer["samples"]) if "samples" in trailer else None
            scores = {str(name): _numbers(row) for name, row in trailer.get("scores", {}).items()}
            (statement,) = _texts([trailer["statement"]]) if "statement" in trailer else (None,)
            (opened,) = _texts([trailer.get("opened", "")])
            if opened:
                expect_opening(opened)
            trace = Trace.read(trailer["trace"]) if "trace" in trailer else None
            engine = {str(name): value for name, value in trailer.get("engine", {}).items()}
            forced = _forced(trailer["forced"]) if "forced" in trailer else None
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The trailer of an answer is damaged ({error}): {line[:200]!r}") from error
        written = "".join(token.text for token in tokens) if tokens else text.removesuffix("\n")
        return cls(
            text=written,
            tokens=tokens,
            dialect=_name(trailer["dialect"]),
            confidence=confidence,
            records_digits="digits" in trailer,
            samples=samples,
            statement=statement,
            scores=scores,
            opened=opened,
            trace=trace,
            engine=engine,
            forced=forced,
            **sizes,
        )


def _digits(tokens: Sequence[Token]) -> dict[str, Any]:
    alternatives = {str(index): token.alternatives for index, token in enumerate(tokens)}
    return {index: _written(value) for index, value in alternatives.items() if value is not None}


def _tokens(texts: Any, logprobs: Any, digits: Any) -> tuple[Token, ...]:
    alternatives = {int(index): _alternatives(value) for index, value in digits.items()}
    pairs = zip(texts, logprobs, strict=True)
    return tuple(_token(*pair, alternatives.get(index)) for index, pair in enumerate(pairs))


def _written_forced(forced: ForcedAnswer) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in forced.reference],
        "logprobs": [[round(token.logprob, 6) for token in tokens] for tokens in (forced.reference, forced.model)],
        "digits": [_digits(tokens) for tokens in (forced.reference, forced.model)],
        # Six digits that count: of eight bits divergences are far below a thousandth.
        "kl": [float(f"{value:.6g}") for value in forced.divergences],
        "agreed": [int(value) for value in forced.agreed],
    }


def _forced(value: Any) -> ForcedAnswer:
    pairs = zip(value["logprobs"], value["digits"], strict=True)
    reference, model = (_tokens(value["tokens"], logprobs, digits) for logprobs, digits in pairs)
    divergences, agreed = value["kl"], value["agreed"]
    if not all(_is_number(kl) and kl >= 0.0 for kl in divergences) or not set(agreed) <= {0, 1}:
        raise ValueError(f"expected divergences of at least 0 and marks of 0 or 1, got {divergences!r:.80}")
    if not len(divergences) == len(agreed) == len(reference):
        raise ValueError(
            f"expected a divergence and a mark for each of {len(reference)} tokens, got {len(divergences)}"
        )
    return ForcedAnswer(reference, model, tuple(map(float, divergences)), tuple(map(bool, agreed)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _share(value: Any) -> float:
    if not (_is_number(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"expected a confidence in [0, 1], got {value!r}")
    return float(value)


def _written(alternatives: Alternatives) -> tuple[dict[str, float], float]:
    return {digits: round(p, 5) for digits, p in alternatives.probabilities.items()}, round(alternatives.unlisted, 5)


def _alternatives(value: Any) -> Alternatives:
    probabilities, unlisted = value
    if not all(digits.isascii() and digits.isdecimal() for digits in probabilities):
        raise ValueError(f"expected probabilities by digits, got {probabilities!r}")
    return Alternatives({digits: _share(p) for digits, p in probabilities.items()}, _share(unlisted))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _numbers(values: Any) -> tuple[float | None, ...]:
    if not all(value is None or _is_number(value) for value in values):
        raise ValueError(f"expected a finite number for each candidate, got {values!r}")
    return tuple(values)


def _texts(value: Any) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise ValueError(f"expected texts, got {value!r}")
    return tuple(value)


def _token(text: Any, logprob: Any, alternatives: Alternatives | None = None) -> Token:
    if not (isinstance(text, str) and _is_number(logprob)):
        raise ValueError(f"expected a text and a finite number for each token, got {text!r}, {logprob!r}")
    return Token(text, float(logprob), alternatives)


def _size(value: Any) -> Size | None:
    if value is None:
        return None
    width, height = value
    if not (isinstance(width, int) and isinstance(height, int)):
        raise ValueError(f"expected a size as [width, height] in pixels, got {value!r}")
    return width, height


def _name(value: Any) -> str | None:
    return None if value is None else str(value)
