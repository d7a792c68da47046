"""Tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer


def end_tokens(model: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer, by the configurations of a model's generating parts and by its tokenizer."""
    configured = (_ids(part.generation_config.eos_token_id) for part in writers(model))
    return tuple(sorted(_ids(tokenizer.eos_token_id).union(*configured)))


def ends_of_checkpoint(path: str, config: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer of a checkpoint whose weights are not loaded.

    Args:
        path: Of the checkpoint, or its id on the hub.
        config: Of the checkpoint.
        tokenizer: Of the checkpoint.
    """
    try:
        configured = GenerationConfig.from_pretrained(path)
    except OSError:
        configured = GenerationConfig.from_model_config(config)
    return tuple(sorted(_ids(tokenizer.eos_token_id) | _ids(configured.eos_token_id)))


def keep_ends(model: Any, tokenizer: Tokenizer) -> None:
    """Make plain ``generate`` of a model end at the same tokens as an evaluation."""
    ends = end_tokens(model, tokenizer)
    for part in writers(model):
        part.generation_config.eos_token_id = list(ends) or None


def writers(model: Any) -> list[Any]:
    """Return all parts of a model that generate text, each with a configuration of its own."""
    # An inner language model may generate on its own, with a configuration of its own.
    return [part for part in model.modules() if isinstance(getattr(part, "generation_config", None), GenerationConfig)]


def _ids(value: int | Sequence[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
