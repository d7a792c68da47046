"""Which experts the tokens of a model's inputs are sent to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmms_plugin.quant_backends.calibration.memory import Residence
from lmms_plugin.quant_backends.layers.wide_products import WideProducts
from lmms_plugin.quant_backends.statistics import TOKEN_ROLES
from lmms_plugin.quant_backends.structure.roles import find_mixtures


@torch.no_grad()
def count_tokens(model: nn.Module, batches: Sequence[Mapping[str, Any]], residence: Residence) -> dict[str, list[int]]:
    """Count the tokens that routers send to each expert.

    Args:
        model: Unquantized, in evaluation mode; its experts may be fused or taken apart.
        batches: Keyword arguments of one forward pass each.
        residence: Where blocks lie while it is not their turn, settled.

    Returns:
        Module name of the experts of a layer -> tokens of each of them, by number. Layers that no token passes have
        zeros; a model without such experts gives nothing.
    """
    mixtures = find_mixtures(model)
    counts = {name: torch.zeros(int(module.num_experts), dtype=torch.int64) for name, module in mixtures.items()}  # type: ignore[arg-type]
    if not counts or not batches:
        return {}
    with ExitStack() as hooks, residence.whole(), WideProducts():
        for name, module in mixtures.items():
            handle = module.register_forward_pre_hook(_counting(counts[name]), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in tqdm(batches, desc="Counting tokens of experts", leave=False, disable=None):
            model(**{key: value for key, value in batch.items() if key != TOKEN_ROLES})
    return {name: count.tolist() for name, count in counts.items()}


def _counting(count: Tensor) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        chosen: Tensor = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        count.add_(torch.bincount(chosen.reshape(-1), minlength=len(count)).cpu())

    return note
