"""Blocks of a model: the units that move to the device one at a time during calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn


def find_blocks(model: nn.Module, layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Cut a model into blocks.

    A block is an element of an outermost ``nn.ModuleList`` (a whole transformer layer), or, where there is no list, the
    largest part that holds layers to quantize (a connector, the output projection). The rest, embeddings and norms
    between blocks, holds no such layer.

    Args:
        model: Any module.
        layers: Names of the layers to quantize.

    Returns:
        Name of each block that has weights -> those of `layers` within it; no block lies within another.
    """
    found = {}
    for name, module in _cut(model, "", frozenset(layers)):
        inside = tuple(layer for layer in layers if within(layer, name))
        if any(True for _ in module.parameters()):
            found[name] = inside
    return found


def within(name: str, parent: str) -> bool:
    """Return whether a module name is `parent` or lies below it; everything lies below the empty name."""
    return not parent or name == parent or name.startswith(f"{parent}.")


def _cut(module: nn.Module, name: str, layers: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList):
        for index, element in enumerate(module):
            child = f"{name}.{index}".lstrip(".")
            # A list of lists has no forward method, so no pass can be suspended there.
            yield from _cut(element, child, layers) if isinstance(element, nn.ModuleList) else [(child, element)]
    elif any(isinstance(part, nn.ModuleList) for part in module.modules()):
        for key, part in module.named_children():
            yield from _cut(part, f"{name}.{key}".lstrip("."), layers)
    elif any(within(layer, name) for layer in layers):
        yield name, module
