"""Random checkpoints of Qwen2.5-VL in several sizes, which benchmarks measure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.families import BUILDERS, widen


class Shape(NamedTuple):
    """Sizes of a Qwen2.5-VL.

    Attributes:
        hidden: Width of the decoder; its heads have `hidden // heads` dimensions.
        inner: Width of the decoder's MLP.
        layers: Number of its blocks.
        heads: Number of its query heads.
        kv_heads: Number of its key and value heads.
        vocabulary: Number of tokens.
        vision: Width, width of the MLP, blocks and heads of the vision tower.
        whole: Blocks of the vision tower that attend to the whole image; the others attend within windows.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: tuple[int, int, int, int]
    whole: Sequence[int]


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, 1, 512, (64, 128, 2, 2), [1]),
    "small": Shape(768, 2048, 12, 12, 2, 16384, (384, 1024, 10, 6), [4, 9]),
    "wide_vision": Shape(768, 2048, 36, 12, 12, 151_936, (1280, 3420, 32, 16), [7, 15, 23, 31]),
    "3b": Shape(2048, 11008, 36, 16, 2, 151_936, (1280, 3420, 32, 16), [7, 15, 23, 31]),
}
"""`small` has a vision tower that takes about as much of a prompt's arithmetic as in the model of 3 billion, `3b`."""


def checkpoint_parts(shape: Shape) -> tuple[Any, Any]:
    """Return configuration and processor of a shape; the output projection is no copy of the embedding."""
    config, processor = BUILDERS["qwen2_5_vl"]()
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = shape.hidden, shape.inner, shape.layers
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.vocab_size = shape.vocabulary
    text.tie_word_embeddings = config.tie_word_embeddings = False
    # Multi-axis rotary positions share half of a head's dimensions, a quarter of them for time.
    pairs = shape.hidden // shape.heads // 2
    space = pairs * 3 // 8
    text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [pairs - 2 * space, space, space]}
    text.layer_types = ["full_attention"] * shape.layers
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = shape.vision
    vision.out_hidden_size, vision.window_size, vision.fullatt_block_indexes = shape.hidden, 112, list(shape.whole)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    return config, processor


def write_checkpoint(folder: Path, shape: Shape = SHAPES["small"], device: str = "cpu") -> int:
    """Write a checkpoint in bfloat16, whose answers end by their length alone; return its number of parameters.

    Args:
        folder: Folder that is written.
        shape: Sizes.
        device: Where weights are drawn.
    """
    from transformers import AutoModelForImageTextToText

    config, processor = checkpoint_parts(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            widen(model)
    # Answers of one length make times comparable, and of ordinary tokens alone they can be compared.
    ordinary = min(processor.tokenizer.all_special_ids)
    model.get_output_embeddings().weight.data[ordinary:] = 0
    # lmms-eval's wrapper reads every checkpoint as bfloat16; written so, all read the same weights.
    model.save_pretrained(folder, max_shard_size="500MB")
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def written(folder: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write a checkpoint into a folder unless it holds one; return the folder, in which one is whole or is not."""
    if not (folder / "config.json").exists():
        unfinished = folder.with_name(f"{folder.name}.part")
        write_checkpoint(unfinished, shape, device)
        unfinished.rename(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folder
