"""Vision, connector, language and head of any vision-language model, by structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lmms_plugin.quant_backends.codes import all_finite
from lmms_plugin.quant_backends.linear import QuantizedLinear
from lmms_plugin.quant_backends.plan import Component

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def components(model: PreTrainedModel) -> dict[str, Component]:
    """Say for every linear layer of a model which component it belongs to.

    The vision tower, the decoder and the output projection are those the transformers model itself
    names; a merger inside the vision tower and everything outside all three is the connector.

    Args:
        model: A transformers model; it may lie on the meta device and may be quantized already.

    Returns:
        Module name -> component, in the order of the model's modules.

    Raises:
        ValueError: The model does not tell its vision tower from its decoder; the message holds the
            upper levels of the module tree.
    """
    component_of = splitter(model)
    return {
        name: component_of(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    }


def splitter(model: PreTrainedModel) -> Callable[[str], Component]:
    """Return the function that maps a module or parameter name of `model` to its component."""
    paths = {id(module): name for name, module in model.named_modules()}
    vision = paths.get(id(model.get_encoder(modality="image")), "")
    language = paths.get(id(model.get_decoder()), "")
    head = paths.get(id(model.get_output_embeddings()), "")
    if not vision or not language or _within(vision, language) or _within(language, vision):
        raise ValueError(
            f"cannot split {type(model).__name__} into vision tower and decoder "
            f"(found {vision or 'none'!r} and {language or 'none'!r}) in\n{module_tree(model)}"
        )

    def component_of(name: str) -> Component:
        if head and _within(name, head):
            return "head"
        if _within(name, language):
            return "language"
        if _within(name, vision) and "merger" not in name.removeprefix(vision):
            return "vision"
        return "connector"

    return component_of


def dense_linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of that name, which is not packed yet."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name}: expected an nn.Linear, got {type(layer).__name__}")
    return layer


def expect_finite(name: str, weight: Tensor) -> None:
    """Refuse weights that no quantizer can do justice to."""
    if not all_finite(weight):
        raise ValueError(f"{name}: the checkpoint's weight holds NaN or infinite values")


def module_tree(model: nn.Module, depth: int = 3) -> str:
    """Return the upper levels of the module tree, one module per line."""
    lines = [type(model).__name__]
    for name, module in model.named_modules():
        level = name.count(".") + 1
        if name and level <= depth:
            lines.append(f"{'  ' * level}{name.rpartition('.')[2]}: {type(module).__name__}")
    return "\n".join(lines)


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")
