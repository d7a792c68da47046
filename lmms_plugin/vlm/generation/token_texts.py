"""Texts of generated tokens, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase as Tokenizer


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of token ids, with special tokens and spaces unchanged."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Split the text of `ids` among them.

    Each token gets what it adds to the settled part of the decoded whole; so the texts add up to the whole, and a
    character that takes several tokens belongs to the last of them. (Decoding token by token does not add up: a run of
    byte tokens, for one, is decoded all at once.)
    """
    whole = decode(tokenizer, ids)
    ends = [0]
    for count in range(1, len(ids)):
        ends.append(max(ends[-1], _common(decode(tokenizer, ids[:count]), whole)))
    ends.append(len(whole))
    return [whole[start:end] for start, end in pairwise(ends)][: len(ids)]


def _common(prefix: str, whole: str) -> int:
    # Nearly every text is a prefix of the whole; only the others are compared letter by letter.
    if whole.startswith(prefix):
        return len(prefix)
    return next((i for i, (mine, final) in enumerate(zip(prefix, whole, strict=False)) if mine != final), len(whole))


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
