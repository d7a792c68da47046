"""Idefics3 without pixel shuffle and tiles as GGUF: a SigLIP tower, a linear connector, a Llama.

llama.cpp's own projector for this family shuffles pixels by two or more and always tiles. Its projector `phi4` is a
perceptron with GELU behind SigLIP, and gelu(x) - gelu(-x) = x: with the first matrix [sP; -sP] and the second
[I/s, -I/s] it is the linear connector P. The scale s = 2**20 moves values beyond |x| = 10, where ggml computes GELU
exactly; within, it takes it from a table in half precision. Powers of two scale without rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from lmms_plugin.quant_backends.checkpoints.gguf.gguf_content import GgufContent, Tensor, Value
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import PROJECTOR
from lmms_plugin.quant_backends.checkpoints.gguf.llama_text import text_content
from lmms_plugin.quant_backends.checkpoints.gguf.stored_weights import StoredWeights

SCALE = 2.0**20
_CONNECTOR = "model.connector.modality_projection.proj.weight"
_TOWER = "model.vision_model."
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def contents(
    config: Any, images: Any, weights: StoredWeights, ends: tuple[int, ...]
) -> tuple[GgufContent, GgufContent]:
    """Return the contents of the language model's file and of the vision tower's.

    Args:
        config: Of the checkpoint, an `Idefics3Config`.
        images: Its image processor.
        weights: Of the checkpoint.
        ends: Ids of the tokens that end an answer.

    Raises:
        ValueError: It shuffles pixels, cuts images into tiles, or has something else that is not written here.
    """
    _expect_whole_images(config, images)
    text = text_content(config.text_config, weights, "model.text_model.", "lm_head.weight", ends)
    vision = GgufContent(PROJECTOR, _header(config, images, weights), [*_tensors(config.vision_config, weights)])
    weights.expect_all_used(["lm_head.weight"] if config.text_config.tie_word_embeddings else ())
    return text, vision


def _expect_whole_images(config: Any, images: Any) -> None:
    if config.scale_factor != 1 or images.do_image_splitting:
        raise ValueError(
            "expected Idefics3 that keeps one token per patch and images whole (scale_factor 1, do_image_splitting "
            f"false), got scale_factor {config.scale_factor} and do_image_splitting {images.do_image_splitting}"
        )
    act = config.vision_config.hidden_act
    if act != "gelu_pytorch_tanh":
        raise ValueError(f"vision_config.hidden_act: expected gelu_pytorch_tanh, got {act}")


def _header(config: Any, images: Any, weights: StoredWeights) -> dict[str, Value]:
    vision = config.vision_config
    pixels = vision.image_size**2
    values = {
        "general.type": "mmproj",
        "general.name": weights.folder.name,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "phi4",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "clip.vision.image_min_pixels": pixels,
        "clip.vision.image_max_pixels": pixels,
        "clip.vision.image_mean": [float(one) for one in images.image_mean],
        "clip.vision.image_std": [float(one) for one in images.image_std],
    }
    return {name: Value.of(value) for name, value in values.items()}


def _tensors(vision: Any, weights: StoredWeights) -> Iterator[Tensor]:
    def both(name: str, source: str) -> Iterator[Tensor]:
        for part in ("weight", "bias"):
            full = f"{_TOWER}{source}.{part}"
            yield Tensor(f"v.{name}.{part}", weights.shape(full), partial(weights.load, full))

    yield from both("patch_embd", "embeddings.patch_embedding")
    position = f"{_TOWER}embeddings.position_embedding.weight"
    yield Tensor("v.position_embd.weight", weights.shape(position), partial(weights.load, position))
    for layer in range(vision.num_hidden_layers):
        for name, source in _LAYER.items():
            yield from both(f"blk.{layer}.{name}", f"encoder.layers.{layer}.{source}")
    yield from both("post_ln", "post_layernorm")
    yield from linear_as_perceptron(weights.load(_CONNECTOR))


def linear_as_perceptron(matrix: np.ndarray[Any, Any]) -> Iterator[Tensor]:
    """Yield the tensors of a GELU perceptron that is the linear map x -> matrix x.

    Args:
        matrix: Of shape (out, in).
    """
    width = matrix.shape[0]
    scale = np.float32(SCALE)
    unit = np.eye(width, dtype=np.float32) / scale
    values = {
        "mm.0.weight": np.concatenate([scale * matrix, -scale * matrix]),
        "mm.0.bias": np.zeros(2 * width, np.float32),
        "mm.2.weight": np.concatenate([unit, -unit], axis=1),
        "mm.2.bias": np.zeros(width, np.float32),
    }
    for name, array in values.items():
        yield Tensor.of(name, array, exact=True)
