"""Rotation of a dense model in place, with the same outputs (QuaRot, arXiv:2404.00456, R1 and R2)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.plans.rotation_spec import RotationSpec
from lmms_plugin.quant_backends.rotations.hadamard import Rotation, rotate_inputs
from lmms_plugin.quant_backends.rotations.sites import Block, Sites, find_sites
from lmms_plugin.quant_backends.rotations.towers import find_tower, read_features, rotate_tower
from lmms_plugin.quant_backends.rotations.weight_changes import by_head, change, change_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Dtype -> largest distance of logits, relative to their spread; a wrong rotation gives about 1."""
_ROUNDED = 0.25
"""The same for weights of 16 bits, which are rounded anew."""


@torch.no_grad()
def rotate(model: PreTrainedModel, spec: RotationSpec, online: Collection[str] = ()) -> None:
    """Rotate the residual stream and the values of each head, in place; the model's outputs stay as they are.

    The vision tower is rotated likewise where that is asked for (`lmms_plugin.quant_backends.rotations.towers`).

    With Q the rotation, embedding, connector and the last layers of attention and MLP write x Q into the stream instead
    of x; layers behind a norm multiply by W diag(g) Q, and the norm's weight g becomes neutral. A head that shares its
    weight with the embedding gets one of its own. Weights are computed in float64 and rounded once.

    Args:
        model: Dense model with its weights.
        spec: Rotation.
        online: Linear layers whose inputs are rotated at run time, of those at the ends of MLPs.

    Raises:
        ValueError: The model does not allow it (see `find_sites`, and `find_tower` for its vision tower), has weights
            out of reach, or answers differently.
    """
    sites, tower = find_sites(model), find_tower(model) if spec.vision else None
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise ValueError(
            f"rotation: {away} is out of reach on disk or in host memory; use a device_map without offload"
        )
    before = _logits(model, sites)
    _Rotating(model, sites, spec).run(frozenset(online))
    _expect_same(model, before, _logits(model, sites), "rotation", "answers")
    if tower is not None:
        # Behind the decoder's rotation, which changes what the connector writes.
        seen = read_features(model, tower)
        rotate_tower(model, tower, spec.seed)
        _expect_same(model, seen, read_features(model, tower), "rotate_vision", "sees")


def _expect_same(model: PreTrainedModel, before: Tensor, after: Tensor, option: str, does: str) -> None:
    difference = float((after - before).norm() / (before - before.mean()).norm())
    if not difference <= _TOLERANCE.get(model.dtype, _ROUNDED):
        raise ValueError(
            f"{option}: {type(model).__name__} {does} differently once rotated (its outputs move by {difference:.2g} of"
            f" their spread); leave {option} out for this model"
        )


def changed_layers(model: PreTrainedModel, spec: RotationSpec) -> frozenset[str]:
    """Return the linear layers whose weights a rotation changes; the model may be on the meta device.

    Raises:
        ValueError: The model does not allow the rotation.
    """
    sites = find_sites(model)
    tower = find_tower(model).linear if spec.vision else ()
    inside = {
        name
        for block in sites.blocks
        for name in (*(n for fed in block.norms.values() for n in fed), block.values, block.outputs, block.down)
    }
    return frozenset({*inside, *sites.entrances, sites.head, *tower})


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
        change(self._module(self.sites.embedding), self.stream)
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
        change_outputs(self._module(block.values), by_head(heads, block.head_size))
        for norm, layers in block.norms.items():
            for name in layers:
                self._read(name, self._gain(norm))
            self._neutralise(norm)
        change(self._module(block.outputs), by_head(heads, block.head_size))
        self._rotate_outputs(block.outputs)
        if block.down in online:
            down = self._module(block.down)
            inputs = Rotation(down.weight.shape[1], self.seed)
            change(down, inputs)
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
        change(layer, lambda rows: self.stream(rows * factors))

    def _rotate_outputs(self, name: str) -> None:
        change_outputs(self._module(name), self.stream)
