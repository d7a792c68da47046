"""What each layer of a decoder does, by structure: attention, feed-forward, experts, router."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from lmms_plugin.quant_backends.plans.plan import Component
from lmms_plugin.quant_backends.plans.role_plan import DecoderPosition, Role
from lmms_plugin.quant_backends.structure.blocks import find_blocks, within
from lmms_plugin.quant_backends.structure.experts import SplitExperts, is_fused

ATTENTION_ARGUMENTS = frozenset({"attention_mask", "position_embeddings", "past_key_values", "cache_params"})
"""What a part of a block is told that mixes positions; a feed-forward part looks at each position alone."""


def find_places(model: nn.Module, components: Mapping[str, Component]) -> dict[str, DecoderPosition]:
    """Say what the linear layers of a decoder's blocks do.

    * attention: they lie in a part of the block that is told about other positions (masks, caches, rotary positions);
    * routed_experts: they belong to one of several like modules, stacked or in a list, beside a router;
    * router: beside such experts, with one output for each of them, or a single one (the gate of a shared expert);
    * shared_expert: what else lies in the part of the block that holds the experts;
    * mlp: everything else.

    Args:
        model: Its fused experts are taken apart, where they can be.
        components: Module name -> component, of all linear layers.

    Returns:
        Module name -> place, in the order of `components`; layers outside of blocks have none.
    """
    layers = tuple(name for name, part in components.items() if part == "language")
    found: dict[str, DecoderPosition] = {}
    for number, (block, inside) in enumerate(_decoder_blocks(model, layers).items()):
        mixtures = dict(_mixtures(model, block))
        found |= {layer: _place(model, block, number, layer, mixtures) for layer in inside}
    return {name: found[name] for name in layers if name in found}


def find_mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """Return module name -> experts of one layer, those whose module is told what the router chose."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, SplitExperts) or is_fused(module)
    }


def _decoder_blocks(model: nn.Module, layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the blocks that come one after another, each with its layers.

    A part outside of a list is none, nor is a layer that is an element of a list by itself.
    """
    blocks = find_blocks(model, layers)
    return {
        name: inside
        for name, inside in blocks.items()
        if inside and name not in inside and name.rpartition(".")[2].isdigit()
    }


def _place(model: nn.Module, block: str, number: int, layer: str, mixtures: Mapping[str, int]) -> DecoderPosition:
    experts = next((name for name in mixtures if within(layer, name)), None)
    if experts is None:
        return DecoderPosition(_role(model, block, layer, mixtures), number)
    expert = layer.removeprefix(f"{experts}.").partition(".")[0]
    return DecoderPosition("routed_experts", number, experts, int(expert))


def _role(model: nn.Module, block: str, layer: str, mixtures: Mapping[str, int]) -> Role:
    part = _part(layer, block)
    if ATTENTION_ARGUMENTS & set(inspect.signature(model.get_submodule(part).forward).parameters):
        return "attention"
    outputs = model.get_submodule(layer).out_features
    if any(within(layer, _parent(name)) and outputs in (1, count) for name, count in mixtures.items()):
        return "router"
    return "shared_expert" if part in {_part(name, block) for name in mixtures} else "mlp"


def _part(name: str, block: str) -> str:
    """Return the direct child of a block that a module is or lies in."""
    return f"{block}.{name.removeprefix(f'{block}.').partition('.')[0]}"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _mixtures(model: nn.Module, block: str) -> Iterator[tuple[str, int]]:
    """Yield name and number of the experts of each mixture in a block."""
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        if isinstance(module, SplitExperts) or is_fused(module):
            yield name, int(module.num_experts)
        elif isinstance(module, nn.ModuleList) and _has_router(model.get_submodule(_parent(name)), len(module)):
            yield name, len(module)


def _has_router(parent: nn.Module, experts: int) -> bool:
    """Return whether a direct child has a weight with one row for each expert."""
    weights = (getattr(child, "weight", None) for child in parent.children())
    rows = {len(weight) for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2}
    return experts > 1 and experts in rows
