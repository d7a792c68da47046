"""Models that tell their layers which positions of the sequence are image tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lmms_plugin.quant_backends.layers.modalities import read
from lmms_plugin.utils.image_positions import image_positions, image_token_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def expect_modalities(model: PreTrainedModel) -> None:
    """Refuse a model in which the positions of images are not known; it may be on the meta device.

    Raises:
        ValueError: It names no image token, its decoder reads no image positions, or its own `generate` reads prompts
            past its forward pass.
    """
    why = None
    if image_token_of(model.config) is None:
        why = "its configuration names no image token"
    elif model.config.is_encoder_decoder:
        why = "it is an encoder-decoder, whose answers have positions of their own"
    elif _generates_past_its_forward(model):
        why = "its generate reads the prompt past its own forward pass"
    if why is not None:
        raise ValueError(
            f"activation_granularity=modality: {type(model).__name__} does not tell image tokens from text, {why};"
            " use tensor or token"
        )


def tell_modalities(model: PreTrainedModel) -> ExitStack:
    """Let a model tell its layers, in every forward pass, which positions are image tokens.

    `generate` gives each pass the ids that it reads: a prompt, a part of one, the rest behind a shared prefix, or a new
    token.

    Returns:
        What ends it, when closed.
    """
    image_token = image_token_of(model.config)

    def before(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        read(None if ids is None else image_positions(ids, image_token, _marks(ids, kwargs)))

    def after(*_: Any) -> None:
        read(None)

    told = ExitStack()
    told.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    told.callback(model.register_forward_hook(after, always_call=True).remove)
    return told


def _marks(ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the processor's own marks of what is read; those of a whole prompt do not fit a part of it."""
    marked = kwargs.get("mm_token_type_ids")
    return marked if marked is not None and marked.shape == ids.shape else None


def _generates_past_its_forward(model: PreTrainedModel) -> bool:
    """Return whether the model's class has a `generate` that calls that of a part."""
    from transformers import GenerationMixin

    own = getattr(type(model), "generate", GenerationMixin.generate)
    if own is GenerationMixin.generate:
        return False
    names = inspect.unwrap(own).__code__.co_names
    return "generate" in names and "super" not in names
