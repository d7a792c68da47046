"""Sensitivity of the answers' loss to single tokens, and to all image and all answer positions, block by block."""

from __future__ import annotations

import inspect
import math
import re
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lmms_plugin.quant_backends.calibration.memory import Residence, return_freed_memory
from lmms_plugin.quant_backends.layers.wide_products import WideProducts
from lmms_plugin.quant_backends.statistics import ROLES, TOKEN_ROLES, WEIGHED, Sensitivity
from lmms_plugin.quant_backends.structure.blocks import find_blocks, within

HALF_PRECISION_SCALE = 1024.0
"""What the loss is multiplied by in float16, where the gradients at image positions (1e-8 to 1e-6) would underflow."""


def measure_sensitivities(
    model: nn.Module,
    layers: Collection[str],
    batches: Sequence[Mapping[str, Any]],
    residence: Residence | None = None,
) -> dict[str, Sensitivity]:
    """Measure the gradients of the answers' cross-entropy by which MBQ weights the modalities.

    For each part of a decoder block (its attention, its MLP), take the gradient with respect to the part's output: mean
    magnitude over image positions and over answer positions, averaged over the samples. A part's image-to-answer ratio
    is raised to at least the median of the corresponding parts of all blocks, as in the authors' code: hardly any
    gradient reaches the image in the last block.

    Every sample goes through the model's own forward pass, one at a time, so that positions and masks are the family's
    own. Parameters get no gradients, and each block is recomputed in the backward pass: memory holds the inputs of all
    blocks for one sample and the activations within one block.

    Args:
        model: Dense or partly quantized model, in evaluation mode.
        layers: Layers whose rows are sequence positions.
        batches: Keyword arguments of one forward pass each, with `TOKEN_ROLES`, one sample each.
        residence: Settled residence that moves blocks to the device for their turn; None when the model is on its
            device.

    Returns:
        Layer -> sensitivity of its part. A layer outside all blocks (the output projection) has none, nor has one in a
        part that no sample runs through.

    Raises:
        ValueError: A loss or a gradient is not finite, or no gradient reaches the answers.
    """
    part_of, gradients = _magnitudes(model, layers, batches, residence, "Weighing modalities")
    means: dict[str, list[Tensor]] = {}
    for batch, found in zip(batches, gradients, strict=True):
        masks = [batch[TOKEN_ROLES].cpu() == ROLES.index(role) for role in WEIGHED]
        for part, magnitude in found.items():
            means.setdefault(part, []).append(torch.stack([magnitude[mask].mean() for mask in masks]).double())
    ratios = _with_ratios({part: torch.stack(each).mean(0).tolist() for part, each in means.items()})
    return {layer: ratios[part] for layer, part in part_of.items() if part in ratios}


def measure_token_weights(
    model: nn.Module,
    layers: Collection[str],
    batches: Sequence[Mapping[str, Any]],
    residence: Residence | None = None,
) -> dict[str, list[Tensor]]:
    """Measure the weight of every token: mean |gradient of the answers' loss| over the elements of its position.

    The gradient is that with respect to the output of the layer's part, as in `measure_sensitivities`. Weights of a
    part are divided by their mean over all positions of all samples.

    Args:
        model: As of `measure_sensitivities`, like all other arguments.
        layers: Layers whose rows are sequence positions.
        batches: Keyword arguments of one forward pass each, with `TOKEN_ROLES`.
        residence: Settled residence, or None.

    Returns:
        Layer -> weights (positions,) float32 of each sample. A position that no gradient reaches has weight 0, as in
        the last block every position but those that predict the answer.

    Raises:
        ValueError: As `measure_sensitivities` does.
    """
    part_of, gradients = _magnitudes(model, layers, batches, residence, "Weighing tokens")
    found: dict[str, list[Tensor]] = {}
    for part in sorted({part for each in gradients for part in each}):
        raw = [
            each.get(part, torch.zeros(batch[TOKEN_ROLES].numel()))
            for batch, each in zip(batches, gradients, strict=True)
        ]
        mean = float(torch.cat(raw).double().mean())
        if not (math.isfinite(mean) and mean > 0):
            raise ValueError(f"{part}: gradients should be finite and reach some token, got mean magnitude {mean:.3g}")
        found[part] = [weights / mean for weights in raw]
    return {layer: found[part] for layer, part in part_of.items() if part in found}


def weigh_modalities(sensitivities: Mapping[str, Sensitivity], roles: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return MBQ's weights, token by token: ρ / N_image at images, 1 / N_answer at answers, 0 at the prompt's text.

    Args:
        sensitivities: Layer -> sensitivity of its part.
        roles: `TOKEN_ROLES` of each sample.

    Returns:
        Layer -> weights (positions,) float32 of each sample.
    """
    image, answer = ([(each == ROLES.index(role)).cpu().float() for each in roles] for role in WEIGHED)
    images, answers = (sum(float(mask.sum()) for mask in masks) for masks in (image, answer))
    return {
        layer: [one.ratio / images * seen + said / answers for seen, said in zip(image, answer, strict=True)]
        for layer, one in sensitivities.items()
    }


@torch.enable_grad()
def _magnitudes(
    model: nn.Module,
    layers: Collection[str],
    batches: Sequence[Mapping[str, Any]],
    residence: Residence | None,
    doing: str,
) -> tuple[dict[str, str], list[dict[str, Tensor]]]:
    """Return layer -> part, and for each sample part -> mean |gradient| at each position, on the host."""
    blocks = find_blocks(model, layers)
    if residence is None:
        residence = Residence()
        residence.settle(model, blocks)
    part_of = {layer: part for layer in layers if (part := _part(layer, blocks)) is not None}
    parts = sorted(set(part_of.values()))
    with _frozen(model), _recomputing(model, residence):
        found = [_gradients(model, parts, batch) for batch in tqdm(batches, desc=doing, leave=False, disable=None)]
    if parts and not any(found):
        raise ValueError(f"no gradient of the answers' loss reaches any of {len(parts)} parts, like {parts[0]}")
    return part_of, found


def _part(layer: str, blocks: Collection[str]) -> str | None:
    """Return the direct child of a block that contains the layer: the block's attention or its MLP."""
    block = next((block for block in blocks if within(layer, block)), None)
    if block is None or layer == block:
        return None
    child = layer.removeprefix(f"{block}.").partition(".")[0]
    return f"{block}.{child}"


def _gradients(model: nn.Module, parts: Sequence[str], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return mean |gradient| at each position of the output of each part, for one sample."""
    inputs = {key: value for key, value in batch.items() if key not in (TOKEN_ROLES, "logits_to_keep")}
    roles = batch[TOKEN_ROLES]
    start = int((roles == ROLES.index("answer")).nonzero()[0])
    found: dict[str, Tensor] = {}

    def note(part: str, gradient: Tensor) -> None:
        found[part] = gradient.abs().mean(-1, dtype=torch.float32).reshape(-1).cpu()

    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(_output_gradient(model.get_submodule(part), part, note))
        loss = _answer_loss(model, inputs, start)
        if not loss.isfinite():
            raise ValueError(f"the loss of a calibration answer is {loss.item():.3g}: it has no gradient to weigh by")
        loss.backward()
    return found


def _answer_loss(model: nn.Module, inputs: Mapping[str, Any], start: int) -> Tensor:
    """Return the mean cross-entropy of the positions from `start` on, each predicted from the one before it."""
    answer = inputs["input_ids"][0, start:]
    # Only these positions are projected onto the vocabulary, where the family allows it.
    options = {"logits_to_keep": len(answer) + 1} if _keeps_logits(model) else {}
    logits = model(**inputs, **options).logits[0, -len(answer) - 1 : -1].float()
    loss = functional.cross_entropy(logits, answer.to(logits.device))
    half = model.get_input_embeddings().weight.dtype == torch.float16  # type: ignore[operator]
    return loss * HALF_PRECISION_SCALE if half else loss


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _with_ratios(magnitudes: Mapping[str, Sequence[float]]) -> dict[str, Sensitivity]:
    ratios: dict[str, float] = {}
    for part, (image, answer) in magnitudes.items():
        if not (math.isfinite(image) and math.isfinite(answer) and answer > 0):
            raise ValueError(
                f"{part}: gradients should be finite and reach the answers, got mean magnitudes {image:.3g} at image "
                f"and {answer:.3g} at answer positions"
            )
        ratios[part] = image / answer
    kinds: dict[str, list[float]] = {}
    for part, ratio in ratios.items():
        kinds.setdefault(_kind(part), []).append(ratio)
    return {
        part: Sensitivity(image, answer, max(ratios[part], statistics.median(kinds[_kind(part)])))
        for part, (image, answer) in magnitudes.items()
    }


def _kind(part: str) -> str:
    """Return a part's name without its numbers, which the corresponding parts of all blocks share."""
    return re.sub(r"\d+", "*", part)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Start gradients at the token embeddings and give none to parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # This is a copy because some families write image features into the embeddings in place, which a leaf forbids.
    hook = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _, __, output: output.detach().requires_grad_().clone()
    )
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_()


class _Turns:
    """Holder of one block at a time on the device: a block stays until the next one's turn, in either direction.

    In the backward pass a block's weights are needed not only for its recomputation, but until the gradient has passed
    through it, which is when the turn of the block before it comes.
    """

    def __init__(self, residence: Residence) -> None:
        self._residence = residence
        self._present: str | None = None

    def take(self, name: str | None) -> None:
        """Bring a block to the device (None for no more) and send the previous one away."""
        if name == self._present:
            return
        if self._present is not None:
            self._residence.leave(self._present)
        if name is not None:
            self._residence.enter(name)
        self._present = name
        return_freed_memory()


@contextmanager
def _recomputing(model: nn.Module, residence: Residence) -> Iterator[None]:
    """Recompute each block's activations in the backward pass, with the block on the device for its turns."""
    modules = {name: model.get_submodule(name) for name in residence.blocks}
    own = {name: vars(module)["forward"] for name, module in modules.items() if "forward" in vars(module)}
    turns = _Turns(residence)
    try:
        for name, module in modules.items():
            module.forward = _recomputed(name, module.forward, turns)
        yield
    finally:
        turns.take(None)
        for name, module in modules.items():
            del module.forward
            if name in own:
                module.forward = own[name]


def _recomputed(name: str, forward: Callable[..., Any], turns: _Turns) -> Callable[..., Any]:
    def present(*args: Any, **kwargs: Any) -> Any:
        turns.take(name)
        # Entered here, since modes do not apply within the call of ``backward`` that recomputes the block.
        with WideProducts():
            return forward(*args, **kwargs)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(present, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed


@contextmanager
def _output_gradient(module: nn.Module, name: str, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Pass the gradient of a module's output (the first one of several) to `note`."""

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if first.requires_grad:
            first.register_hook(lambda gradient: note(name, gradient))

    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
