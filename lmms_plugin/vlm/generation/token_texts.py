"""Texts of generated tokens, one by one."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast

_BROKEN = "\ufffd"
"""What stands for bytes that are no character, or not yet one."""
_STRIDE = 12
"""Tokens between two places at which a text is settled: few decodings are long, and few decode context again."""
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOCAL = ("Fuse", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder")
"""Decoders of `tokenizers` in which nothing but a token's neighbours decides its text."""


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of token ids, with special tokens and spaces unchanged."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Split the text of `ids` among them.

    Each token gets what it adds to the settled part of the decoded whole; so the texts add up to the whole, and a
    character that takes several tokens belongs to the last of them. (Decoding token by token does not add up: a run of
    byte tokens, for one, is decoded all at once.)

    Where the tokenizer's decoder lets what follows a place be decoded without what is before it, the time grows with
    the number of tokens; elsewhere (a tokenizer in Python, an unknown decoder) with its square.
    """
    ids = list(ids)
    texts = _Texts(tokenizer, ids, decode(tokenizer, ids))
    ends = [0, *texts.ends()]
    # The last token takes what is left.
    ends[len(ids) :] = [len(texts.whole)]
    return [texts.whole[start:end] for start, end in pairwise(ends)][: len(ids)]


def _steps(tokenizer: Tokenizer) -> list[Mapping[str, Any]] | None:
    """Return the steps of a tokenizer's decoder; None where it is not known to be the library's own."""
    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (kind.decode, kind._decode) != (
        PreTrainedTokenizerFast.decode,
        PreTrainedTokenizerFast._decode,
    ):
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    told = json.loads(decoder.__getstate__())
    return list(told["decoders"]) if told["type"] == "Sequence" else [told]


def _is_local(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        # A pattern of several characters, or an expression, may match across tokens that are fused.
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in _LOCAL or (step["type"] == "Strip" and step["stop"] == 0)


@dataclass
class _Texts:
    """Places in the text of token ids at which the single tokens end.

    Attributes:
        tokenizer: Tokenizer of the ids.
        ids: Ids of tokens.
        whole: Text of all of them.
    """

    tokenizer: Tokenizer
    ids: list[int]
    whole: str
    of_bytes: bool = field(init=False)
    local: bool = field(init=False)
    _end: int = field(default=0, init=False)
    _alone: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        steps = _steps(self.tokenizer)
        self.of_bytes = steps is not None and [step["type"] for step in steps] == ["ByteLevel"]
        self.local = self.of_bytes or (steps is not None and all(map(_is_local, steps)))
        self._decode: Callable[[list[int]], str] = (
            (lambda ids: self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))
            if self.local
            else (lambda ids: decode(self.tokenizer, ids))
        )
        falls_back = steps is not None and any(step["type"] == "ByteFallback" for step in steps)
        names = self.tokenizer.convert_ids_to_tokens(self.ids) if self.local and falls_back else []
        # An id beyond the vocabulary has no name and no text: bytes before and after it are one run.
        self._bytes = [b"" if name is None else _byte_of(name) for name in names] or [None] * len(self.ids)

    def ends(self) -> Iterator[int]:
        """Yield where each token ends: it has what it adds to the longest part that the text so far and all share.

        The text of the tokens before a place, and a context before it that is dropped again, give the text up to any
        token behind it: what is before the context changes nothing there.
        """
        settled = 0
        for start, stop in pairwise(self._places()):
            context = self._context(start)
            before = self._decode(self.ids[context:start]) if context < start else ""
            dropped = self._firm(before)
            text = self._decode(self.ids[context:stop])
            run = self._run(start, stop) if context < start else None
            if run is not None and text[dropped:] == _text(run):
                yield from map(self._reach, self._through_run(start, stop, settled))
            else:
                for count in range(start + 1, stop + 1):
                    so_far = self._decode(self.ids[context:count])[dropped:]
                    yield self._reach(settled + self._shared(so_far, settled))
            settled += self._firm(text) - dropped

    def _reach(self, end: int) -> int:
        self._end = max(self._end, end)
        return self._end

    def _places(self) -> list[int]:
        """Return places between tokens, with both ends, behind which decoding needs no more than a short context."""
        places = [0]
        for place in range(1, len(self.ids)) if self.local else ():
            opens = place + 1 < len(self.ids) and self._in_run(place, place + 1)
            if not self._in_run(place - 1, place) and (opens or place - places[-1] >= _STRIDE):
                places.append(place)
        return [*places, len(self.ids)] if self.ids else places

    def _in_run(self, one: int, other: int) -> bool:
        """Return whether two neighbours are decoded together, as bytes of one run."""
        return self._bytes[one] is not None and self._bytes[other] is not None

    def _run(self, start: int, stop: int) -> bytes | None:
        """Return the bytes of tokens that are one long run; None if one of them is no byte, or they are few."""
        run = [one for one in self._bytes[start:stop] if one is not None]
        return b"".join(run) if len(run) == stop - start > _STRIDE else None

    def _context(self, place: int) -> int:
        """Return from where to decode what follows a place.

        The first tokens of a text may lose a space, so the context has text of its own. A character's bytes may lie
        before the place; from the fourth byte on, decoding is at the same character wherever it began.
        """
        missing = _LONGEST_CHARACTER if self.of_bytes else 1
        while place > 0 and missing:
            place -= 1
            missing -= self._text_alone(place) != ""
        return place

    def _text_alone(self, place: int) -> str:
        index = self.ids[place]
        if index not in self._alone:
            self._alone[index] = self._decode([index])
        return self._alone[index]

    def _firm(self, text: str) -> int:
        """Return the length of what is settled of a text: its end may stand for the beginning of a character."""
        return len(text) - (self.of_bytes and text.endswith(_BROKEN))

    def _shared(self, text: str, place: int) -> int:
        # Nearly every text is a part of the whole; only the others are compared letter by letter.
        if self.whole.startswith(text, place):
            return len(text)
        pairs = enumerate(zip(text, self.whole[place : place + len(text)], strict=False))
        return next((i for i, (mine, final) in pairs if mine != final), len(self.whole) - place)

    def _through_run(self, start: int, stop: int, settled: int) -> Iterator[int]:
        """Yield what `ends` does within a run of bytes: a part of it is text if all of it is, else broken bytes."""
        broken = _leading(self.whole[settled : settled + stop - start])
        is_text = _is_text(b"".join(one or b"" for one in self._bytes[start:stop]))
        reader = codecs.getincrementaldecoder("utf-8")("strict")
        read, count, failed = "", 0, False
        for one in self._bytes[start:stop]:
            count += len(one or b"")
            try:
                read += "" if failed else reader.decode(one or b"")
            except UnicodeDecodeError:
                failed = True
            if failed or reader.getstate()[0]:
                yield settled + min(count, broken)
            else:
                yield settled + (len(read) if is_text else min(_leading(read), broken))


def _byte_of(name: str) -> bytes | None:
    found = _BYTE.fullmatch(name)
    return None if found is None else bytes.fromhex(found[1])


def _is_text(run: bytes) -> bool:
    try:
        run.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text(run: bytes) -> str:
    return run.decode() if _is_text(run) else _BROKEN * len(run)


def _leading(text: str) -> int:
    return len(text) - len(text.lstrip(_BROKEN))


def cut(texts: Sequence[str], until: Sequence[str]) -> list[str]:
    """Cut tokens' texts where the first of the strings begins; a token that holds its beginning is shortened."""
    whole = "".join(texts)
    found = [position for string in until if (position := whole.find(string)) >= 0]
    if not found:
        return list(texts)
    kept: list[str] = []
    left = min(found)
    for text in texts:
        if left <= 0:
            break
        kept.append(text[:left])
        left -= len(text)
    return kept
