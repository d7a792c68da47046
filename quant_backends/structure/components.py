"""Components of any vision-language model (vision, connector, language, head), found by structure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import all_finite
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import Component

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def components(model: PreTrainedModel) -> dict[str, Component]:
    """Return the component of every linear layer of a model.

    The vision tower, the decoder, the output projection and an audio tower are those the transformers model itself
    names. Any other part that takes pixels (a second tower for details or for video) is vision too. The connector is
    everything outside of all these, and the part of a vision tower after its last attention block, or named a merger
    there. Modules that the forward pass never calls, such as image-generation heads, are unused. A retrieval model has
    no decoder: its heads are the linear layers outside all of its parts, and the rest, which reads the text, is the
    connector. A model that feeds pixels directly to its decoder has no vision tower.

    Args:
        model: Model of transformers; it may be on the meta device and may be quantized already.

    Returns:
        Module name -> component, in the order of the model's modules.

    Raises:
        ValueError: The model does not separate its vision tower from its decoder; the message names its parts.
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
    decoder = model.get_decoder()
    language = paths.get(id(decoder), "")
    audio = paths.get(id(model.get_encoder(modality="audio")), "")
    unused = list(_unused(model, language))
    pixels = [tower for tower in _takers_of_pixels(paths, model) if not any(_within(tower, part) for part in unused)]
    vision = paths.get(id(model.get_encoder(modality="image")), "") or _outermost(pixels, language)
    heads = _heads(model, paths)
    if vision and decoder is model and not model.can_generate():
        # It generates no text; its outputs are the linear layers outside all of its parts.
        heads += [name for name, module in model.named_children() if isinstance(module, nn.Linear | QuantizedLinear)]
    elif not _apart(vision, language) and (vision or pixels or not _reads_pixels_itself(model, language, heads)):
        parts = ", ".join(f"{name}: {type(module).__name__}" for name, module in _parts(model, language or vision))
        raise ValueError(
            f"cannot split {type(model).__name__} into vision tower and decoder (found {vision or 'none'!r} and "
            f"{language or 'none'!r} among {parts}): expected the two side by side, as get_encoder and get_decoder of "
            "its class tell; this family is not supported"
        )
    towers = [tower for tower in (vision, *pixels) if tower and not (language and _within(tower, language))]
    behind = {tail for tower in towers for tail in _behind_attention(model, tower)}

    def component_of(name: str) -> Component:
        if any(_within(name, part) for part in unused):
            return "unused"
        if any(_within(name, head) for head in heads):
            return "head"
        if language and _within(name, language):
            return "language"
        tower = next((tower for tower in towers if _within(name, tower)), None)
        if tower is not None and "merger" not in name.removeprefix(tower):
            return "connector" if any(_within(name, tail) for tail in behind) else "vision"
        return "audio" if tower is None and audio and _within(name, audio) else "connector"

    return component_of


def _apart(vision: str, language: str) -> bool:
    return bool(vision and language) and not _within(vision, language) and not _within(language, vision)


def _outermost(towers: Sequence[str], language: str) -> str:
    """Return the first tower that lies in no other one and neither contains the decoder nor lies in it."""
    return next((tower for tower in towers if not language or _apart(tower, language)), "")


def _parts(model: nn.Module, inner: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of the module that holds the one called `inner`."""
    holder = inner.rpartition(".")[0]
    for name, module in model.get_submodule(holder).named_children():
        yield f"{holder}.{name}".lstrip("."), module


def _reads_pixels_itself(model: PreTrainedModel, language: str, heads: Sequence[str]) -> bool:
    """Return whether only linear layers lie between the pixels and the decoder."""
    if not language or model.config.is_encoder_decoder:
        return False
    beside = [(name, part) for name, part in _parts(model, language) if name not in (language, *heads)]
    return any(isinstance(layer, nn.Linear | QuantizedLinear) for _, part in beside for layer in part.modules())


def _unused(model: nn.Module, language: str) -> Iterator[str]:
    """Yield the parts beside the decoder, and beside what holds it, that no forward pass calls."""
    holder = language
    while holder:
        holder = holder.rpartition(".")[0]
        owner = model.get_submodule(holder)
        named = _names_in_forward(type(owner))
        yield from (f"{holder}.{name}".lstrip(".") for name, _ in owner.named_children() if name not in named)


def _names_in_forward(kind: type[nn.Module]) -> frozenset[str]:
    """Return every name used in the forward pass of a class, directly or in methods that it calls."""
    found: set[str] = set()
    waiting, seen = ["forward"], set()
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            member = vars(owner).get(name)
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            spoken = set() if code is None else _names_in(code)
            found |= spoken
            waiting += spoken
    return frozenset(found)


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    return set(code.co_names) | texts | {name for part in inner for name in _names_in(part)}


def _behind_attention(model: nn.Module, tower: str) -> Iterator[str]:
    """Yield the modules of a vision tower that process patches after the last block, towards the decoder.

    An attention-pooling head is not among them: it reduces all patches to one, which no decoder gets.
    """
    module, name = model.get_submodule(tower), tower
    while len(children := list(module.named_children())) == 1 and not isinstance(module, nn.ModuleList):
        name, module = f"{name}.{children[0][0]}", children[0][1]
    last = max((i for i, (_, child) in enumerate(children) if _holds_blocks(child)), default=len(children))
    for key, child in children[last + 1 :]:
        inside = list(child.modules())
        pools = any(isinstance(part, nn.MultiheadAttention) for part in inside)
        if not pools and any(isinstance(part, nn.Linear | QuantizedLinear) for part in inside):
            yield f"{name}.{key}"


def _holds_blocks(part: nn.Module) -> bool:
    lists = (module for module in part.modules() if isinstance(module, nn.ModuleList))
    inside = (module for blocks in lists for block in blocks for module in block.modules())
    return any("attention" in type(module).__name__.lower() for module in inside)


def _heads(model: PreTrainedModel, paths: Mapping[int, str]) -> list[str]:
    """Return the output projections: an inner model does not always expose its own on the outermost one."""
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
    """Refuse weights that are not finite."""
    if not all_finite(weight):
        raise ValueError(f"{name}: the checkpoint's weight holds NaN or infinite values")


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")
