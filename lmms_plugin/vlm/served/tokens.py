"""From a server's response to the tokens of an answer, with probabilities that are really such."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from lmms_plugin.protocol.response import Alternatives, Token
from lmms_plugin.vlm.contracts.engine import Generated
from lmms_plugin.vlm.generation.number_tokens import LEAST, NumberTokens
from lmms_plugin.vlm.generation.special_tokens import Special
from lmms_plugin.vlm.generation.token_texts import cut, decode, token_texts
from lmms_plugin.vlm.served.client import ServerError

PLACEHOLDER = -9000.0
"""Below this a number is what servers write where they have none (-9999), not the logarithm of a probability."""
BY_CHARACTERS = "by_characters"
"""Marks an answer for which a part of a character has no probability, as llama.cpp tells them."""
_ABOVE_ONE = 1e-3
"""By how much rounding may lift a probability, or the sum of several, above 1."""
_ID = re.compile(r"token_id:(\d+)")
_MOST = math.log1p(_ABOVE_ONE)
_RUN = re.compile(r"([^0-9]*)([0-9]+)([^0-9]*)")
_ENDED = ("stop", "length")
_BROKEN = "\ufffd"


class Candidate(NamedTuple):
    """A token that a server tells of.

    Attributes:
        id: Id of the token; None where the server does not tell.
        text: Text of the token alone.
        raw: Bytes of the token; None where it is known by its id.
        logprob: Log-probability as the server tells it.
    """

    id: int | None
    text: str
    raw: bytes | None
    logprob: float


_UNKNOWN = Candidate(None, "", None, math.nan)


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's tokenizer, for reading what a server wrote.

    Attributes:
        tokenizer: Tokenizer of the checkpoint.
        ends: Ids of the tokens that end an answer.
        special: Ids of the tokens that are no text.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    special: Special
    _by_name: dict[str, tuple[int, str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def numbers(self) -> NumberTokens:
        """The tokens of digits."""
        return NumberTokens(self.tokenizer)

    @cached_property
    def kinds(self) -> Mapping[tuple[str, str], int]:
        """Text around the digits of a token -> how many tokens have digits in just that place."""
        counts: dict[tuple[str, str], int] = {}
        for index in self.numbers.ids:
            found = _digits(decode(self.tokenizer, [index]))
            if found is not None:
                counts[found.around] = counts.get(found.around, 0) + 1
        return counts

    @cached_property
    def end_texts(self) -> frozenset[str]:
        """Texts of the tokens that end an answer."""
        return frozenset(decode(self.tokenizer, [index]) for index in self.ends)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the tokens that are no text, long ones first."""
        texts = {decode(self.tokenizer, [index]) for index in self.special.tokens}
        return tuple(sorted(filter(None, texts), key=len, reverse=True))

    def candidate(self, entry: Mapping[str, Any]) -> Candidate:
        """Read one token of a server's `logprobs`.

        Raises:
            ServerError: it has no text or no number.
        """
        text, logprob = entry.get("token"), entry.get("logprob")
        # An answer comes with hundreds of alternatives, which are mostly the same.
        known = self._by_name.get(text) if isinstance(text, str) else None
        if known is not None and type(logprob) is float:
            return Candidate(known[0], known[1], None, logprob)
        if not isinstance(text, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise ServerError(f"expected token and logprob for each token, got {json.dumps(entry)[:200]}")
        named = _ID.fullmatch(text)
        index = int(named[1]) if named else entry.get("id")
        if isinstance(index, int) and not isinstance(index, bool):
            alone = decode(self.tokenizer, [index])
            if named:
                self._by_name[text] = (index, alone)
            return Candidate(index, alone, None, float(logprob))
        raw = entry.get("bytes")
        raw = bytes(raw) if isinstance(raw, list) and raw else text.encode()
        return Candidate(None, raw.decode(errors="replace"), raw, float(logprob))

    def read(
        self,
        choice: Mapping[str, Any],
        until: Sequence[str],
        *,
        probabilities: bool,
        digits: bool,
        written: int | None = None,
    ) -> Generated:
        """Read an answer.

        Args:
            choice: Choice of the response.
            until: Strings that end an answer and are cut off.
            probabilities: Whether log-probabilities are wanted; without, they are NaN.
            digits: Whether alternatives of tokens of digits are wanted.
            written: Number of tokens that the server says it generated; None where it does not say.

        Raises:
            ServerError: It is no whole answer, its tokens do not spell it, or it has no true probabilities.
        """
        _expect_ended(choice)
        content = str((choice.get("message") or {}).get("content") or "")
        # Where ids come anyway, nobody looks at log-probabilities that were not asked for.
        entries = _entries(choice) if probabilities or _given_ids(choice) is None else []
        told = [self.candidate(entry) for entry in entries]
        ids = self._ids(choice, told)
        if ids is None and not told:
            if probabilities:
                raise ServerError("log-probabilities were asked for and none came with this answer")
            kept = "".join(cut([content], until))
            return Generated((Token(kept, math.nan),), kept, ())
        texts, ended = self._texts(ids, told)
        self._expect_spelled("".join(texts), content, choice)
        if not probabilities:
            logprobs = [math.nan] * len(texts)
        elif ids is not None and choice.get(BY_CHARACTERS) and len(told) < len(texts):
            places = list(_places(ids, texts, told, len(cut(texts, until))))
            told = [told[place] if place is not None else _UNKNOWN for place in places]
            entries = [entries[place] if place is not None else {} for place in places]
            logprobs = [math.nan if one is _UNKNOWN else as_logprob(one.logprob, one.text) for one in told]
        else:
            _expect_all(choice, told, len(texts), written, ended)
            logprobs = [as_logprob(one.logprob, one.text) for one in told]
        alternatives: list[Alternatives | None] = [None] * len(texts)
        if probabilities and digits:
            alternatives = [self._alternatives(one, entry) for one, entry in zip(told, entries, strict=True)]
        kept_texts = cut(texts, until)
        tokens = tuple(map(Token, kept_texts, logprobs, alternatives))
        return Generated(tokens, self._shown(kept_texts, ids, ended), tuple(ids or ()))

    def _shown(self, texts: Sequence[str], ids: Sequence[int] | None, ended: int | None) -> str:
        """Join the texts of an answer's tokens without special tokens and the one that ends it."""
        silent = self.special.tokens - self.special.marks
        return "".join(
            text for i, text in enumerate(texts) if not (ids is not None and ids[i] in silent) and i != ended
        )

    def _ids(self, choice: Mapping[str, Any], told: Sequence[Candidate]) -> list[int] | None:
        given = _given_ids(choice)
        if given is not None:
            ids = given
        elif told and all(one.id is not None for one in told):
            ids = [one.id for one in told if one.id is not None]
        else:
            return None
        beyond = [index for index in ids if not 0 <= index < len(self.tokenizer)]
        if beyond:
            raise ServerError(
                f"token {beyond[0]} is beyond the {len(self.tokenizer)} tokens of the checkpoint: pretrained= must be "
                "the checkpoint that the server serves"
            )
        return ids

    def _texts(self, ids: Sequence[int] | None, told: Sequence[Candidate]) -> tuple[list[str], int | None]:
        """Texts of the tokens, and where among them the one is that ends the answer."""
        if ids is not None:
            ended = bool(ids) and ids[-1] in self.ends
            body = list(ids[:-1] if ended else ids)
            return token_texts(self.tokenizer, body) + [""] * ended, len(body) if ended else None
        ended = bool(told) and told[-1].text in (*self.end_texts, "")
        body_of = told[:-1] if ended else told
        texts = _texts_of_bytes([one.raw or b"" for one in body_of])
        return texts + [""] * ended, len(texts) if ended else None

    def _expect_spelled(self, spelled: str, content: str, choice: Mapping[str, Any]) -> None:
        """Check that tokens and text are one answer; a server that cuts or parses its text has part of it."""
        message = choice.get("message") or {}
        parsed = any(message.get(name) for name in ("reasoning_content", "reasoning", "tool_calls"))
        if parsed or _BROKEN in spelled or _BROKEN in content:
            return
        plain, said = self._plain(spelled), self._plain(content)
        stopped = choice.get("finish_reason") == "stop"
        if plain == said or (stopped and plain.startswith(said)):
            return
        raise ServerError(
            f"the answer's tokens spell {plain!r:.120} and its text is {said!r:.120}: pretrained= must be the "
            "checkpoint that the server serves, with its tokenizer"
        )

    def _plain(self, text: str) -> str:
        """A text without special tokens, which servers show or leave out, and without spaces at its ends."""
        for special in self.special_texts:
            text = text.replace(special, "")
        return text.strip()

    def _probabilities(self, entries: Sequence[Mapping[str, Any]]) -> dict[tuple[int | None, str], float]:
        """Probabilities of the tokens that a server tells of, by id and text; see `candidate`."""
        seen: dict[tuple[int | None, str], float] = {}
        for entry in entries:
            text, logprob = entry.get("token"), entry.get("logprob")
            token: tuple[int | None, str] | None = self._by_name.get(text) if type(text) is str else None
            if token is None or type(logprob) is not float or not PLACEHOLDER < logprob <= 0.0:
                one = self.candidate(entry)
                token, logprob = one[:2], as_logprob(one.logprob, one.text)
            seen[token] = math.exp(logprob)
        return seen

    def _alternatives(self, chosen: Candidate, entry: Mapping[str, Any]) -> Alternatives | None:
        place = _digits(chosen.text)
        if place is None:
            return None
        others = entry.get("top_logprobs") or []
        seen = self._probabilities(others) | {chosen[:2]: math.exp(as_logprob(chosen.logprob, chosen.text))}
        mass = sum(seen.values())
        if mass > 1 + _ABOVE_ONE:
            raise ServerError(
                f"the probabilities of {chosen.text!r} and what could stand in its place add up to {mass:.3f}: these "
                "are no log-probabilities of one distribution (serve them raw: --logprobs-mode raw_logprobs)"
            )
        listed: dict[str, float] = {}
        unlisted = 0.0
        numbers = [(_digits(text), probability) for (_, text), probability in seen.items()]
        alike = [(one.digits, probability) for one, probability in numbers if one and one.around == place.around]
        for digits, probability in sorted(alike, key=itemgetter(1), reverse=True):
            if probability >= LEAST:
                listed[digits] = min(1.0, listed.get(digits, 0.0) + probability)
            else:
                unlisted += probability
        if self.kinds.get(place.around, 0) > len(others):
            # More tokens of this kind exist than the server lists: the rest may be theirs.
            unlisted += max(0.0, 1.0 - mass)
        return Alternatives(listed, min(1.0, unlisted))


def _entries(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(entry) for entry in (choice.get("logprobs") or {}).get("content") or []]


def _given_ids(choice: Mapping[str, Any]) -> list[int] | None:
    given = choice.get("token_ids")
    return given if isinstance(given, list) and all(isinstance(index, int) for index in given) else None


def _expect_ended(choice: Mapping[str, Any]) -> None:
    if choice.get("finish_reason") not in _ENDED:
        raise ServerError(
            f"the answer was broken off (finish_reason {choice.get('finish_reason')!r}, expected stop or length)"
        )


def _expect_all(
    choice: Mapping[str, Any], told: Sequence[Candidate], texts: int, written: int | None, ended: int | None
) -> None:
    """Raise an error unless each token of an answer has a log-probability of its own."""
    of_all = texts
    if not isinstance(choice.get("token_ids"), list) and written is not None:
        # Some servers count the token that ends an answer and tell nothing of it.
        silent_end = choice.get("finish_reason") == "stop" and ended is None
        of_all = written - (silent_end and len(told) == written - 1)
    if len(told) != of_all:
        raise ServerError(
            f"the answer has {of_all} tokens and log-probabilities of {len(told)} of them: tokens without a "
            "probability of their own (speculative decoding, tokens that are grouped, a tool or reasoning "
            "parser, partial characters) cannot be judged"
        )


def _places(ids: Sequence[int], texts: Sequence[str], told: Sequence[Candidate], kept: int) -> Iterator[int | None]:
    """Yield, for each token, where its probability is told; None for a part of a character, of which none is.

    Args:
        ids: of the answer's tokens.
        texts: of the same; a character that takes several tokens belongs to the last of them.
        told: with ids, of fewer tokens.
        kept: tokens that the answer has before what ends it; later ones may lack theirs.

    Raises:
        ServerError: those that are told are not the others.
    """
    place = 0
    for number, (index, text) in enumerate(zip(ids, texts, strict=True)):
        if place < len(told) and told[place].id == index and (text or number == len(ids) - 1):
            yield place
            place += 1
        elif text and _BROKEN not in text and number < kept:
            raise ServerError(
                f"the answer has {len(ids)} tokens and log-probabilities of {len(told)} of them, and none of {text!r}: "
                "tokens without probability (speculative decoding) cannot be judged"
            )
        else:
            yield None


class _Digits(NamedTuple):
    digits: str
    around: tuple[str, str]


@lru_cache(maxsize=4096)
def _digits(text: str) -> _Digits | None:
    """The one run of digits in a text, and what is around it."""
    match = _RUN.fullmatch(text)
    return None if match is None else _Digits(match[2], (match[1], match[3]))


def as_logprob(value: float, text: str) -> float:
    """Return a number that a server gives for the log-probability of a token.

    Raises:
        ServerError: it is none.
    """
    if PLACEHOLDER < value <= _MOST:
        return min(0.0, value)
    if value > _MOST:
        raise ServerError(
            f"token {text!r} comes with {value:g}, above 0: this is no logarithm of a probability (serve raw ones: "
            "--logprobs-mode raw_logprobs)"
        )
    raise ServerError(
        f"token {text!r} comes with {value:g}, which stands for no probability: was the answer forced (structured "
        "output, allowed tokens, a bias)?"
    )


def _texts_of_bytes(parts: Sequence[bytes]) -> list[str]:
    """Share a text among the tokens whose bytes it is; a character belongs to the last of them that it takes."""
    texts, pending = [], b""
    for part in parts:
        pending += part
        try:
            texts.append(pending.decode())
            pending = b""
        except UnicodeDecodeError:
            texts.append("")
    if pending and texts:
        texts[-1] = pending.decode(errors="replace")
    return texts
