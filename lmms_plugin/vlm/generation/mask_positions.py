"""Positions of tokens from the attention mask, for models whose own positions count padding.

`generate` makes positions of the mask, but `prepare_inputs_for_generation` of some families drops them: of Kosmos-2 and
Kosmos-2.5, because they lack the offset of the embedding's table, of EXAONE 4.5 and HyperCLOVA X Vision, because other
families need three of them. The model then numbers new tokens by the length of the cache, padding included, and answers
in a padded batch, or behind a shared prefix with padding after it, are not those of the question alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin


def number_by_mask(model: nn.Module) -> None:
    """Give a model positions of the attention mask wherever it is called without any.

    Alone, these are the positions that the model makes itself. A second call changes nothing.
    """
    for module in _counting(model):
        if _numbered not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_numbered, with_kwargs=True)


def _counting(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what numbers tokens in the place of `generate`.

    These are decoders that embed positions by fairseq's table, whose row of padding shifts all others, and a model that
    prepares its inputs itself and has one position for each token.
    """
    for module in model.modules():
        if _table_start(module) is not None and _takes_both(module):
            yield module
    prepares = getattr(type(model), "prepare_inputs_for_generation", None)
    if prepares is not GenerationMixin.prepare_inputs_for_generation and _takes_both(model) and not _has_axes(model):
        yield model


def _table_start(module: nn.Module) -> int | None:
    """Return the row of padding in a decoder's table of positions; None without such a table."""
    table = getattr(module, "embed_positions", None)
    return getattr(table, "padding_idx", None) if hasattr(table, "create_position_ids_from_input_ids") else None


def _takes_both(module: nn.Module) -> bool:
    return {"position_ids", "attention_mask"} <= inspect.signature(module.forward).parameters.keys()


def _has_axes(model: Any) -> bool:
    """Return whether positions have several axes (M-RoPE), which the mask does not tell."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return any("mrope_section" in one for one in (rope, *rope.values()) if isinstance(one, dict))


def _numbered(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Fill in `position_ids` (rows, columns) that were given as None."""
    mask: Tensor | None = kwargs.get("attention_mask")
    read = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    dropped = "position_ids" in kwargs and kwargs["position_ids"] is None
    if not dropped or mask is None or mask.ndim != 2 or read is None:
        return None
    start = _table_start(module)
    counted = mask.long().cumsum(1) * mask.long()
    # The first token has the row behind that of padding, or place 0.
    places = counted + start if start is not None else (counted - 1).clamp(min=0)
    return args, {**kwargs, "position_ids": places[:, -read.shape[1] :].contiguous()}
