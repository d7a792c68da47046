"""Vision, connector, language and head of any vision-language model, by structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lmms_plugin.quant_backends.codes import all_finite
from lmms_plugin.quant_backends.linear import QuantizedLinear
from lmms_plugin.quant_backends.plan import Component

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def components(model: PreTrainedModel) -> dict[str, Component]:
    """Say for every linear layer of a model which component it belongs to.

    The vision tower, the decoder, the output projection and an audio tower are those the transformers model itself
    names. Any other part that takes pixels (a second tower for details or for video) is vision too; a merger inside a
    vision tower and everything outside of all these is the connector. A retrieval model has no decoder: its heads are
    the linear layers that no part of it holds, and the rest, which reads the text, is the connector.

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
    decoder = model.get_decoder()
    language = paths.get(id(decoder), "")
    audio = paths.get(id(model.get_encoder(modality="audio")), "")
    heads = _heads(model, paths)
    if vision and decoder is model and not model.can_generate():
        # It writes nothing; what it ends in are the linear layers that belong to no part of it.
        heads += [name for name, module in model.named_children() if isinstance(module, nn.Linear | QuantizedLinear)]
    elif not vision or not language or _within(vision, language) or _within(language, vision):
        raise ValueError(
            f"cannot split {type(model).__name__} into vision tower and decoder "
            f"(found {vision or 'none'!r} and {language or 'none'!r}) in\n{module_tree(model)}"
        )
    pixels = (tower for tower in _takers_of_pixels(paths, model) if not language or not _within(language, tower))
    towers = [vision, *pixels]

    def component_of(name: str) -> Component:
        if any(_within(name, head) for head in heads):
            return "head"
        if language and _within(name, language):
            return "language"
        tower = next((tower for tower in towers if _within(name, tower)), None)
        if tower is not None and "merger" not in name.removeprefix(tower):
            return "vision"
        return "audio" if tower is None and audio and _within(name, audio) else "connector"

    return component_of


def _heads(model: PreTrainedModel, paths: Mapping[int, str]) -> list[str]:
    """Return the output projections: a whole model within does not always hand its own on to the outermost one."""
    found = [part.get_output_embeddings() for part in model.modules() if hasattr(part, "get_output_embeddings")]
    heads = {id(head): head for head in found if isinstance(head, nn.Linear | QuantizedLinear)}
    return [paths[key] for key in heads if key in paths]


def _takers_of_pixels(paths: Mapping[int, str], model: PreTrainedModel) -> Iterator[str]:
    for module in model.modules():
        if getattr(module, "main_input_name", None) == "pixel_values" and paths[id(module)]:
            yield paths[id(module)]


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
