"""The text of generated tokens, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE = 64


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of some token ids, special tokens and spaces as they are."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Split the text of `ids` among them.

    Each token gets what it adds to the part of the decoded whole that is settled; so the texts add up to the whole, and
    a character that takes several tokens belongs to the last of them. (Decoding token by token does not add up: a run
    of byte tokens, for one, is read all at once.)
    """
    # Splitting takes time quadratic in the number of tokens, so a long answer is split piece by piece where its pieces
    # add up to it, which they do unless one of them begins in the middle of a character or loses its leading space.
    pieces = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
    if len(pieces) > 1 and "".join(decode(tokenizer, piece) for piece in pieces) == decode(tokenizer, ids):
        return [text for piece in pieces for text in _split(tokenizer, piece)]
    return _split(tokenizer, ids)


def _split(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    whole = decode(tokenizer, ids)
    ends = [0]
    for count in range(1, len(ids)):
        prefix = decode(tokenizer, ids[:count])
        settled = (i for i, (mine, final) in enumerate(zip(prefix, whole, strict=False)) if mine != final)
        ends.append(max(ends[-1], next(settled, min(len(prefix), len(whole)))))
    ends.append(len(whole))
    return [whole[start:end] for start, end in pairwise(ends)][: len(ids)]


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
