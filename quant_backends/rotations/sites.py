"""Weights that read or write a decoder's residual stream: which they are, and which models do not allow a rotation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmms_plugin.quant_backends.rotations.weight_changes import matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRANCES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llava", "vipllava", "internvl", "mistral3"), ("*multi_modal_projector.linear_2",)),
    **dict.fromkeys(
        ("llava_next", "llava_next_video", "llava_onevision"), ("*multi_modal_projector.linear_2", "*image_newline")
    ),
    "paligemma": ("*multi_modal_projector.linear",),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), ("*visual.merger.mlp.2",)),
    # DeepStack adds the outputs of further mergers to the stream after the first blocks.
    "qwen3_vl": ("*visual.merger.linear_fc2", "*visual.deepstack_merger_list.*.linear_fc2"),
    **dict.fromkeys(("idefics3", "smolvlm"), ("*connector.modality_projection.proj",)),
}
"""Model type -> patterns of the linear layers whose outputs, and the parameters which, become tokens of the decoder."""

_BLOCK = re.compile(
    r"(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm)\.weight"
    r"|(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.(weight|bias)"
)
_LINEAR = (*(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class Block(NamedTuple):
    """Modules of one block of a decoder.

    Attributes:
        norms: Norm -> linear layers that it feeds, but for the values.
        attention_norm: Norm before the attention.
        values: Linear layer that makes the values.
        outputs: Linear layer behind the attention.
        down: Linear layer at the end of the MLP.
        head_size: Columns of a head.
    """

    norms: Mapping[str, tuple[str, ...]]
    attention_norm: str
    values: str
    outputs: str
    down: str
    head_size: int


class Sites(NamedTuple):
    """Everything that a rotation of the residual stream changes, by module or parameter name.

    Attributes:
        hidden: Width of the stream.
        embedding: Embedding of the tokens.
        entrances: Linear layers of the connector whose outputs enter the stream.
        vectors: Parameters (..., hidden) that enter the stream.
        blocks: Blocks of the decoder.
        last_norm: Norm behind the last block.
        head: Output projection.
        neutral: Value of a norm's weight at which it only normalises: 1, or 0 in norms that multiply by 1 + weight.
    """

    hidden: int
    embedding: str
    entrances: tuple[str, ...]
    vectors: tuple[str, ...]
    blocks: tuple[Block, ...]
    last_norm: str
    head: str
    neutral: float


def find_sites(model: PreTrainedModel) -> Sites:
    """Return what a rotation changes; the model may be on the meta device.

    Raises:
        ValueError: The model does not allow a rotation, or its family is not in `ENTRANCES`; the message says why.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    kind = model.config.model_type
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or head is None:
        raise _refusal(model, "it is no decoder with one output projection")
    neutral = _expect_structure(model, decoder)
    if kind not in ENTRANCES:
        known = ", ".join(sorted(ENTRANCES))
        raise _refusal(model, f"where images enter the decoder is known for {known}, not for {kind}")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    entering = ENTRANCES[kind]
    linear = tuple(name for name in modules if matches(name, entering) and isinstance(modules[name], nn.Linear))
    vectors = tuple(name for name in parameters if matches(name, entering))
    if not linear:
        raise _refusal(model, f"no linear layer {entering[0]} ends its connector")
    hidden = decoder.get_input_embeddings().weight.shape[1]
    widths = {name: modules[name].out_features for name in linear} | {n: parameters[n].shape[-1] for n in vectors}
    for name, width in widths.items():
        if width != hidden:
            raise _refusal(model, f"{name} gives {width} columns, not the {hidden} of the residual stream")
    name = paths[id(decoder)]
    blocks = tuple(_block(f"{name}.layers.{index}", layer) for index, layer in enumerate(decoder.layers))
    return Sites(
        hidden,
        paths[id(decoder.get_input_embeddings())],
        linear,
        vectors,
        blocks,
        f"{name}.norm",
        paths[id(head)],
        neutral,
    )


def _refusal(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"rotation: {type(model).__name__} cannot be rotated, {why}; leave rotation out")


def _expect_structure(model: nn.Module, decoder: nn.Module) -> float:
    """Refuse a decoder with anything besides plain blocks; return the neutral weight of its norms."""
    centred = next((name for name, module in decoder.named_modules() if isinstance(module, nn.LayerNorm)), None)
    if centred is not None:
        raise _refusal(model, f"{centred} of its decoder is a LayerNorm, and decoders are rotated with RMSNorms alone")
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _refusal(model, f"its decoder {type(decoder).__name__} has no list of layers")
    for name, _ in decoder.named_parameters():
        key = name.removeprefix("layers.").partition(".")[2]
        known = _BLOCK.fullmatch(key) if name.startswith("layers.") else name in ("embed_tokens.weight", "norm.weight")
        if not known:
            owner = decoder.get_submodule(name.rpartition(".")[0])
            raise _refusal(model, f"a rotation has no rule for {name} ({type(owner).__name__}) of its decoder")
    for index, layer in enumerate(layers):
        why = _why_no_plain_block(layer)
        if why is not None:
            raise _refusal(model, f"layer {index} of its decoder has {why}")
    neutral = {_neutral(model, name, norm) for name, norm in _norms(decoder)}
    if len(neutral) != 1:
        raise _refusal(model, "its norms differ in kind")
    return neutral.pop()


def _why_no_plain_block(layer: Any) -> str | None:
    """Return what a block lacks or has beyond a plain one; None for a plain one."""
    parts = dict(layer.named_modules())
    missing = next((name for name in (*_LINEAR, *_NORMS) if name not in parts), None)
    if missing is not None:
        return f"no {missing}"
    special = next((name for name in _LINEAR if type(parts[name]).forward is not nn.Linear.forward), None)
    if special is not None:
        return f"a {special} that does more than multiply ({type(parts[special]).__name__})"
    queries, outputs = layer.self_attn.q_proj.out_features, layer.self_attn.o_proj.in_features
    return None if queries == outputs else f"an attention with {queries} queries, but {outputs} outputs"


def _norms(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in decoder.named_modules():
        if name == "norm" or name.endswith(("input_layernorm", "post_attention_layernorm")):
            yield name, module


def _neutral(model: nn.Module, name: str, norm: Any) -> float:
    """Return the weight at which a norm only divides by the root mean square, found by trying it out."""
    draw = torch.Generator().manual_seed(0)
    size = norm.weight.shape[0]
    # While a checkpoint is read, new tensors are otherwise made on the meta device in the checkpoint's dtype.
    with torch.device("cpu"):
        x = torch.randn(3, size, generator=draw, dtype=torch.float32) + 1
        weight = torch.rand(size, generator=draw, dtype=torch.float32)
        # All parameters are replaced for this call.
        found: Tensor = functional_call(norm, {"weight": weight}, (x,))
        plain = x / x.square().mean(-1, keepdim=True).sqrt()
        for neutral in (1.0, 0.0):
            if torch.allclose(found, plain * (weight + 1 - neutral), rtol=1e-3, atol=1e-4):
                return neutral
    raise _refusal(model, f"{name} ({type(norm).__name__}) is no RMSNorm, whose output a rotation of its input rotates")


def _block(name: str, layer: Any) -> Block:
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    before, between = f"{name}.input_layernorm", f"{name}.post_attention_layernorm"
    return Block(
        norms={
            before: (f"{attention}.q_proj", f"{attention}.k_proj"),
            between: (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        },
        attention_norm=before,
        values=f"{attention}.v_proj",
        outputs=f"{attention}.o_proj",
        down=f"{mlp}.down_proj",
        head_size=int(layer.self_attn.head_dim),
    )
