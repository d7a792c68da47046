"""Tokens that are no text, and those among them that part reasoning and answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from lmms_plugin.protocol.reasoning import ANSWER, REASONING, tokens_among
from lmms_plugin.vlm.contracts.engine import Traits
from lmms_plugin.vlm.generation.token_texts import decode


class Special(NamedTuple):
    """Ids of special tokens.

    Attributes:
        tokens: Tokens that are no text.
        marks: Tokens among them that part reasoning and answer.
    """

    tokens: frozenset[int]
    marks: frozenset[int]


def special_tokens(tokenizer: Tokenizer, ends: Collection[int]) -> Special:
    """Return a tokenizer's special tokens, with those that end an answer."""
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tags = tokens_among([token.content for token in added.values()], (*REASONING, *ANSWER))
    marks = frozenset(index for index, token in added.items() if token.content in tags)
    return Special(frozenset({*added, *ends}), marks)


def traits_of(tokenizer: Tokenizer, special: Special, image_reader: str) -> Traits:
    """Return what all answers that are written with a tokenizer have in common.

    Args:
        tokenizer: Tokenizer of the model.
        special: Special tokens of the model.
        image_reader: Image processor that resizes images for the model.
    """
    return Traits(
        silent=frozenset(decode(tokenizer, [token]) for token in special.tokens - special.marks),
        answer_marks=tokens_among([decode(tokenizer, [token]) for token in special.marks], ANSWER),
        image_reader=image_reader,
    )
