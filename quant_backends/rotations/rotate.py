"""Rotation of a dense model in place, with the same outputs (QuaRot, arXiv:2404.00456, R1 and R2)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import rows_per_block
from lmms_plugin.quant_backends.plans.rotation_spec import RotationSpec
from lmms_plugin.quant_backends.rotations.hadamard import Rotation, rotate_inputs
from lmms_plugin.quant_backends.rotations.sites import Block, Sites, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Dtype -> largest distance of logits, relative to their spread; a wrong rotation gives about 1."""
_ROUNDED = 0.25
"""The same for weights of 16 bits, which are rounded anew."""

Step = Callable[[Tensor], Tensor]


@torch.no_grad()
def rotate(model: PreTrainedModel, spec: RotationSpec, online: Collection[str] = ()) -> None:
    """Rotate the residual stream and the values of each head, in place; the model's outputs stay as they are.

    With Q the rotation, embedding, connector and the last layers of attention and MLP write x Q into the stream instead
    of x; layers behind a norm multiply by W diag(g) Q, and the norm's weight g becomes neutral. A head that shares its
    weight with the embedding gets one of its own. Weights are computed in float64 and rounded once.

    Args:
        model: Dense model with its weights.
        spec: Rotation.
        online: Linear layers whose inputs are rotated at run time, of those at the ends of MLPs.

    Raises:
        ValueError: The model does not allow it (see `find_sites`), has weights out of reach, or answers differently.
    """
    sites = find_sites(model)
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise ValueError(
            f"rotation: {away} is out of reach on disk or in host memory; use a device_map without offload"
        )
    before = _logits(model, sites)
    _Rotating(model, sites, spec).run(frozenset(online))
    after = _logits(model, sites)
    difference = float((after - before).norm() / (before - before.mean()).norm())
    if not difference <= _TOLERANCE.get(model.dtype, _ROUNDED):
        raise ValueError(
            f"rotation: {type(model).__name__} answers differently once rotated (its logits move by {difference:.2g} of"
            " their spread); leave rotation out for this model"
        )


def changed_layers(sites: Sites) -> frozenset[str]:
    """Return the linear layers whose weights a rotation changes."""
    inside = {
        name
        for block in sites.blocks
        for name in (*(n for fed in block.norms.values() for n in fed), block.values, block.outputs, block.down)
    }
    return frozenset({*inside, *sites.entrances, sites.head})


def _logits(model: PreTrainedModel, sites: Sites) -> Tensor:
    """Return the logits of a few tokens of text, (tokens, vocabulary) float64."""
    embedding = model.get_submodule(sites.embedding)
    vocabulary = min(embedding.weight.shape[0], model.get_submodule(sites.head).weight.shape[0])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=draw).to(embedding.weight.device)
    states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    logits: Tensor = model.get_submodule(sites.head)(states)
    return logits[0].double()


class _Rotating:
    """One rotation of one model."""

    def __init__(self, model: PreTrainedModel, sites: Sites, spec: RotationSpec) -> None:
        self.model, self.sites, self.seed = model, sites, spec.seed
        self.stream = Rotation(sites.hidden, spec.seed)

    def run(self, online: frozenset[str]) -> None:
        self._untie()
        _change(self._module(self.sites.embedding), self.stream)
        for name in self.sites.entrances:
            self._rotate_outputs(name)
        for name in self.sites.vectors:
            vector = self.model.get_parameter(name)
            vector.data = self.stream(vector.double()).to(vector.dtype)
        for number, block in enumerate(self.sites.blocks):
            self._rotate_block(block, number, online)
        self._read(self.sites.head, self._gain(self.sites.last_norm))
        self._neutralise(self.sites.last_norm)

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _untie(self) -> None:
        head, embedding = self._module(self.sites.head), self._module(self.sites.embedding)
        if head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)

    def _rotate_block(self, block: Block, number: int, online: frozenset[str]) -> None:
        # Seeds of their own: equal signs in all heads of all layers would be a needless coincidence.
        heads = Rotation(block.head_size, self.seed + 1 + number)
        # Several rotations of one weight are rounded together.
        twice = [self._module(name) for name in (block.values, block.outputs, block.down)]
        dtypes = [layer.weight.dtype for layer in twice]
        for layer in twice:
            layer.double()
        self._read(block.values, self._gain(block.attention_norm))
        _change_outputs(self._module(block.values), _by_head(heads, block.head_size))
        for norm, layers in block.norms.items():
            for name in layers:
                self._read(name, self._gain(norm))
            self._neutralise(norm)
        _change(self._module(block.outputs), _by_head(heads, block.head_size))
        self._rotate_outputs(block.outputs)
        if block.down in online:
            down = self._module(block.down)
            inputs = Rotation(down.weight.shape[1], self.seed)
            _change(down, inputs)
            rotate_inputs(down, inputs)
        self._rotate_outputs(block.down)
        for layer, dtype in zip(twice, dtypes, strict=True):
            layer.to(dtype)

    def _gain(self, norm: str) -> Tensor:
        gain: Tensor = self._module(norm).weight.double() + (1 - self.sites.neutral)
        return gain

    def _neutralise(self, norm: str) -> None:
        weight = self._module(norm).weight
        weight.data = torch.full_like(weight, self.sites.neutral)

    def _read(self, name: str, gain: Tensor) -> None:
        layer = self._module(name)
        factors = gain.to(layer.weight.device)
        _change(layer, lambda rows: self.stream(rows * factors))

    def _rotate_outputs(self, name: str) -> None:
        _change_outputs(self._module(name), self.stream)


def _by_head(rotation: Rotation, size: int) -> Step:
    """Return the rotation of each head of (..., heads · size)."""
    return lambda x: rotation(x.unflatten(-1, (-1, size))).flatten(-2)


def _change(layer: Any, step: Step) -> None:
    """Replace each row of a weight, a few at a time."""
    weight = layer.weight
    size = rows_per_block(weight.shape[1])
    weight.data = torch.cat([step(rows.double()).to(weight.dtype) for rows in weight.data.split(size)])


def _change_outputs(layer: Any, step: Step) -> None:
    """Replace each column of a weight, a few at a time, and the bias."""
    weight = layer.weight
    size = rows_per_block(weight.shape[0])
    parts = [step(columns.double()).to(weight.dtype) for columns in weight.data.T.split(size)]
    weight.data = torch.cat(parts).T.contiguous()
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = step(layer.bias.double()).to(layer.bias.dtype)
