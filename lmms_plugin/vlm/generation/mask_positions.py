"""Positions of tokens from the attention mask, for decoders whose own positions count the padding of a batch.

Kosmos-2 and Kosmos-2.5 number the tokens of a prompt without its padding, but a token of the answer by the length of
the cache, padding included: `prepare_inputs_for_generation` of transformers drops the positions that `generate` made of
the mask, because these lack the offset of the embedding's table. In a padded batch an answer is then not that of the
question alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def number_by_mask(model: nn.Module) -> None:
    """Give the decoders of a model that need them positions of the attention mask, in every forward pass without any.

    Alone, these are the positions that the model makes itself. A second call changes nothing.
    """
    for decoder in _counting_decoders(model):
        if _numbered not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(_numbered, with_kwargs=True)


def _counting_decoders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that embed positions by fairseq's table, whose row of padding shifts all others."""
    for module in model.modules():
        table = getattr(module, "embed_positions", None)
        if not hasattr(table, "create_position_ids_from_input_ids") or getattr(table, "padding_idx", None) is None:
            continue
        if {"position_ids", "attention_mask"} <= inspect.signature(module.forward).parameters.keys():
            yield module


def _numbered(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Add `position_ids` (rows, columns) to the arguments of a forward pass: the table's row of each token."""
    mask: Tensor | None = kwargs.get("attention_mask")
    read = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if kwargs.get("position_ids") is not None or mask is None or mask.ndim != 2 or read is None:
        return None
    # Padding has the row of padding, and the first token the one behind it.
    rows = mask.long().cumsum(1) * mask.long() + decoder.embed_positions.padding_idx
    return args, {**kwargs, "position_ids": rows[:, -read.shape[1] :].contiguous()}
