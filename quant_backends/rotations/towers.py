"""Rotation of a vision tower with LayerNorms in place, with the same outputs, by rotations that keep the mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.rotations.hadamard import MeanKeepingRotation, Rotation
from lmms_plugin.quant_backends.rotations.weight_changes import Step, by_head, change, change_outputs, matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RAW = dict.fromkeys(("llava", "llava_next", "llava_next_video", "llava_onevision"), "*multi_modal_projector.linear_1")
"""Their connectors read the stream as it leaves a block."""
_NORMED = {
    **dict.fromkeys(("idefics3", "smolvlm"), "*connector.modality_projection.proj"),
    "paligemma": "*multi_modal_projector.linear",
}
"""Those of these read it behind the tower's last norm."""
EXITS: Mapping[str, str] = {**_RAW, **_NORMED}
"""Model type -> pattern of the linear layers that read the tower's features, one patch or several side by side."""

_LINEAR = (*(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2")
_NORMS = ("layer_norm1", "layer_norm2")


class TowerSites(NamedTuple):
    """Everything that a rotation of a vision tower changes, by module name.

    Attributes:
        width: Width of its residual stream.
        patches: Convolution that embeds patches.
        positions: Embedding of their positions.
        blocks: Its blocks.
        last_norm: Norm behind the last block that the connector reads; None where it reads the stream itself.
        exits: Linear layers of the connector that read its features.
        head_size: Columns of a head.
    """

    width: int
    patches: str
    positions: str
    blocks: tuple[str, ...]
    last_norm: str | None
    exits: tuple[str, ...]
    head_size: int

    @property
    def linear(self) -> Iterator[str]:
        """Yield the linear layers whose weights a rotation changes."""
        yield from (f"{block}.{name}" for block in self.blocks for name in _LINEAR)
        yield from self.exits


def find_tower(model: PreTrainedModel) -> TowerSites:
    """Return what a rotation of the vision tower changes; the model may be on the meta device.

    Raises:
        ValueError: The tower does not allow a rotation, or its family is not in `EXITS`; the message says why.
    """
    kind = model.config.model_type
    if kind not in EXITS:
        raise _refusal(model, f"where the features of a {kind} tower are read is not known")
    found = model.get_encoder(modality="image")
    tower = next((one for one in found.modules() if hasattr(one, "embeddings") and hasattr(one, "encoder")), None)
    blocks = None if tower is None else getattr(tower.encoder, "layers", None)
    if tower is None or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise _refusal(model, f"{type(found).__name__} has no embeddings and encoder with a list of layers")
    paths = {id(module): name for name, module in model.named_modules()}
    name = paths[id(tower)]
    _expect_plain(model, tower, blocks)
    width = tower.embeddings.position_embedding.embedding_dim
    attention: Any = blocks[0].get_submodule("self_attn")
    exits = tuple(
        one for one, layer in model.named_modules() if matches(one, (EXITS[kind],)) and isinstance(layer, nn.Linear)
    )
    for one in exits:
        columns = model.get_submodule(one).in_features
        if columns % width:
            raise _refusal(model, f"{one} reads {columns} columns, no multiple of the tower's {width}")
    if not exits:
        raise _refusal(model, f"no linear layer {EXITS[kind]} reads its features")
    return TowerSites(
        width,
        f"{name}.embeddings.patch_embedding",
        f"{name}.embeddings.position_embedding",
        tuple(f"{name}.encoder.layers.{index}" for index in range(len(blocks))),
        f"{name}.post_layernorm" if kind in _NORMED else None,
        exits,
        int(attention.head_dim),
    )


def _refusal(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"rotate_vision: the vision tower of {type(model).__name__} cannot be rotated, {why}; leave rotate_vision out"
    )


def _expect_plain(model: nn.Module, tower: Any, blocks: nn.ModuleList) -> None:
    """Refuse a tower with anything besides embeddings of patches and positions, and blocks with two LayerNorms."""
    inside = {name for name, _ in tower.embeddings.named_parameters()}
    if inside - {"patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight"}:
        raise _refusal(model, f"its embeddings hold {', '.join(sorted(inside))}")
    for norm in ("pre_layrnorm", "pre_layernorm"):
        if isinstance(getattr(tower, norm, None), nn.LayerNorm):
            raise _refusal(model, f"its {norm} writes into the stream, and no weight behind it could rotate that")
    for index, block in enumerate(blocks):
        parts = dict(block.named_modules())
        owners = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        if owners != {*_LINEAR, *_NORMS}:
            raise _refusal(model, f"layer {index} has weights in {', '.join(sorted(owners))}")
        if not all(type(parts[name]) is nn.Linear for name in _LINEAR):
            raise _refusal(model, f"layer {index} has layers that do more than multiply")
        if not all(type(parts[name]) is nn.LayerNorm for name in _NORMS):
            raise _refusal(model, f"layer {index} has norms that are no LayerNorm")


@torch.no_grad()
def read_features(model: PreTrainedModel, sites: TowerSites) -> Tensor:
    """Return what the connector's first layer makes of noise, (patches, columns) float64."""
    seen: list[Any] = []
    last: Any = model.get_submodule(sites.blocks[-1])
    handle = last.register_forward_hook(lambda _, args, output: seen.append(output))
    patches: Any = model.get_submodule(sites.patches)
    size = model.config.vision_config.image_size
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, patches.in_channels, size, size, generator=draw)
    try:
        model.get_encoder(modality="image")(pixel_values=pixels.to(patches.weight))
    finally:
        handle.remove()
    states = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    states = states if sites.last_norm is None else model.get_submodule(sites.last_norm)(states)
    layer: Any = model.get_submodule(sites.exits[0])
    features: Tensor = layer(states.repeat(1, 1, layer.in_features // sites.width))
    return features[0].double()


@torch.no_grad()
def rotate_tower(model: PreTrainedModel, sites: TowerSites, seed: int) -> None:
    """Rotate the residual stream of a vision tower, and the values of each head, in place.

    A LayerNorm subtracts the mean and divides by the deviation; both stay as they are under a rotation that keeps the
    vector of ones, so that norm(x Q) = norm(x) Q. The norm's weight g goes into the layers behind it, and its bias b
    becomes (b / g) Q. Weights are computed in float64 and rounded once.

    Raises:
        ValueError: A norm has weights that are zero.
    """
    stream = MeanKeepingRotation(sites.width, seed)
    patches = model.get_submodule(sites.patches)
    flat: Any = patches.weight.data.flatten(1).double()
    patches.weight.data = stream(flat.T).T.reshape(patches.weight.shape).to(patches.weight.dtype).contiguous()
    if patches.bias is not None:
        patches.bias.data = stream(patches.bias.double()).to(patches.bias.dtype)
    change(model.get_submodule(sites.positions), stream)
    for number, block in enumerate(sites.blocks):
        values, outputs, down = (
            model.get_submodule(f"{block}.{one}") for one in ("self_attn.v_proj", "self_attn.out_proj", "mlp.fc2")
        )
        # Several rotations of one weight are rounded together.
        dtype = values.weight.dtype
        for layer in (values, outputs):
            layer.double()
        heads = by_head(Rotation(sites.head_size, seed + 1 + number), sites.head_size)
        readers = [f"{block}.self_attn.{letter}_proj" for letter in "qkv"]
        _absorb(model, f"{block}.layer_norm1", readers, stream)
        change_outputs(values, heads)
        change(outputs, heads)
        change_outputs(outputs, stream)
        for layer in (values, outputs):
            layer.to(dtype)
        _absorb(model, f"{block}.layer_norm2", [f"{block}.mlp.fc1"], stream)
        change_outputs(down, stream)
    if sites.last_norm is not None:
        _absorb(model, sites.last_norm, sites.exits, stream)
        return
    for name in sites.exits:
        change(model.get_submodule(name), by_head(stream, sites.width))


def _absorb(model: nn.Module, norm: str, readers: Any, stream: MeanKeepingRotation) -> None:
    """Let layers behind a norm, which read one token or several side by side, take over its weight, and rotate both."""
    module: Any = model.get_submodule(norm)
    gain = module.weight.double()
    if not bool((gain != 0).all()):
        raise ValueError(f"rotate_vision: {norm} has weights of zero, which no layer behind it can take over")
    for name in readers:
        layer: Any = model.get_submodule(name)
        times = layer.in_features // len(gain)
        factors = gain.repeat(times)
        change(layer, _scaled(factors, by_head(stream, len(gain))))
    if module.bias is not None:
        module.bias.data = stream(module.bias.double() / gain).to(module.bias.dtype)
    module.weight.data = torch.ones_like(module.weight)


def _scaled(factors: Tensor, step: Step) -> Step:
    return lambda rows: step(rows * factors)
