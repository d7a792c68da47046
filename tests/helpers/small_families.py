"""Every family of transformers' image-text-to-text mapping as a tiny model, by shrinking its default configuration.

What a name of a configuration's attribute means is the same in nearly all families, so that sizes are set by name.
What one family wants beyond that stands in `CHANGES`, with dots into its parts.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from helpers.families import byte_level_tokenizer, widen
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.plans.plan import COMPONENTS, QuantPlan
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.structure.components import components
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.decoding import Decoder
from lmms_plugin.vlm.generation.prefix import Encoded, NotShareable, PrefixSharing
from lmms_plugin.vlm.generation.processor import Batch
from lmms_plugin.vlm.generation.self_check import padded_difference

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
VOCABULARY, PAD = 512, 0
CHANNELS, IMAGE_SIZE = 3, 56
LAYERS = 2
VIDEO_DIMENSIONS = 5
"""Of pixels that are (videos, frames, channels, height, width)."""
LARGEST = 13_000_000
"""Parameters above which a family is not run."""

SIZES: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "text_layers", "vision_layers", "n_layer", "layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "hidden_dim", "out_hidden_size", "width"), 64),
    **dict.fromkeys(("encoder_hidden_size", "projection_dim", "text_hidden_size", "vision_hidden_size"), 64),
    **dict.fromkeys(("projector_hidden_size", "projection_hidden_size", "vision_output_dim", "output_dim"), 64),
    **dict.fromkeys(("image_token_embed_dim", "projector_output_dim", "text_dim", "d_hidden", "output_dims"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_global_heads", "heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("hidden_sizes", "projector_input_dim", "moe_hidden_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "projection_intermediate_size"), 128),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_sliding_attention_heads"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "base_channels", "latent_channels"), 32),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "downsample_hidden_size"), 64),
    **dict.fromkeys(("hc_lowrank", "shared_experts_intermediate_size"), 32),
    "num_filters": 8,
    "num_res_blocks": 1,
    "swa_head_dim": 16,
    "conf_num_hidden_layers": LAYERS,
    "conf_num_attention_heads": 4,
    "head_dim": 16,
    "d_kv": 16,
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "mm_embed_dim": 64,
    "output_proj_dims": 64,
    "num_kv_shared_layers": 0,
}
"""What an attribute of that name becomes wherever it occurs."""


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and all configurations within."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts_of(value)


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a configuration tiny, in place."""
    ids: dict[int | None, int] = {}
    for part in parts_of(config):
        layers = next((vars(part)[name] for name in ("num_hidden_layers", "depth") if name in vars(part)), None)
        kinds = list(dict.fromkeys(vars(part).get("layer_types") or ()))
        kept = max(LAYERS, len(kinds))
        grouped = _plain(part, "num_key_value_heads") not in (None, _plain(part, "num_attention_heads"))
        for name, value in list(vars(part).items()):
            if name == "head_dim" and "qk_rope_head_dim" in vars(part):
                # Of latent attention it is the size of what turns with the position, which keeps its own.
                continue
            if name == "num_key_value_heads" and not grouped:
                _set_size(part, name, SIZES["num_attention_heads"])
            elif _is_id_to_change(name, value):
                setattr(part, name, ids.setdefault(value, VOCABULARY - 1 - len(ids)))
            elif isinstance(value, list | tuple) and len(value) == layers:
                setattr(part, name, _shortened(name, [*kinds, *value] if name == "layer_types" else value, kept))
            else:
                _shrink_value(part, name, value)
        if kinds:
            part.num_hidden_layers = kept
    return config


def _plain(part: PreTrainedConfig, name: str) -> Any:
    """Return an attribute as it is for all layers, whatever some layers have."""
    return vars(part)[name] if name in vars(part) else getattr(part, name, None)


def _set_size(part: PreTrainedConfig, name: str, size: int) -> None:
    if isinstance(vars(part)[name], int):
        setattr(part, name, size)


def _shrink_value(part: PreTrainedConfig, name: str, value: Any) -> None:
    """Shrink what takes no more than its own name and value to shrink."""
    if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
        setattr(part, name, min(value, SIZES[name]))
    elif name in SIZES and isinstance(value, list | tuple):
        setattr(part, name, _shortened(name, value, len(value)))
    elif name == "image_size" and isinstance(value, int) and isinstance(patch := vars(part).get("patch_size"), int):
        part.image_size = min(value, 8 * patch)
    elif name == "rope_parameters" and isinstance(value, dict):
        for rope in (value, *(inner for inner in value.values() if isinstance(inner, dict))):
            if "mrope_section" in rope and "qk_rope_head_dim" not in vars(part):
                rope["mrope_section"] = [4, 2, 2]


def _is_id_to_change(name: str, value: Any) -> bool:
    """Tell whether an attribute is a token's id beyond the vocabulary, or that of an image's token left open."""
    if value is None:
        return name in ("image_token_id", "image_token_index", "video_token_index")
    return isinstance(value, int) and value >= VOCABULARY and re.search(r"_token_(id|index)$|_id$", name) is not None


def _shortened(name: str, values: Sequence[Any], kept: int) -> list[Any]:
    return [min(each, SIZES[name]) if name in SIZES else each for each in values[:kept]]


def small_config(family: str) -> PreTrainedConfig:
    """Return the tiny configuration of a family."""
    config = shrink(CONFIG_MAPPING[family](**PARTS.get(family, {})))
    for name, value in CHANGES.get(family, {}).items():
        *within, attribute = name.split(".")
        part = config
        for key in within:
            part = getattr(part, key)
        setattr(part, attribute, value)
    return config


class Tiny:
    """A tiny model of a family and what it is given, made by hand below the level of processors.

    Attributes:
        family: a name of `FAMILIES`.
        model: with wide random weights from seed 0, in evaluation mode.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = small_config(family)
            with torch.device("meta"):
                size = AutoModelForImageTextToText.from_config(config).num_parameters()
            if size > LARGEST:
                raise ValueError("its default configuration does not shrink by the names of its attributes")
            self.model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
            widen(self.model)

    def image(self, seed: int) -> dict[str, torch.Tensor]:
        """Return keyword arguments for one image: those of the first way of `_ways` that the model takes."""
        for number, way in enumerate(self._ways(seed)):
            if self._way is None:
                try:
                    self._count = self._tokens(way)
                except Exception:
                    continue
                self._way = number
            if number == self._way:
                return way
        raise ValueError("its image processor's layout of an image is not written down here")

    _way: int | None = None
    _count = 0

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names of the arguments of the forward pass."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @cached_property
    def _demanded(self) -> frozenset[str]:
        """Names of the arguments about images without which there is no forward pass."""
        given = inspect.signature(self.model.forward).parameters.values()
        demanded = {one.name for one in given if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
        return frozenset(demanded - {"input_ids", "attention_mask"})

    @property
    def image_token(self) -> int:
        """Id of the token that stands for a piece of an image."""
        named = (getattr(self.model.config, name, None) for name in ("image_token_id", "video_token_id"))
        return int(next(filter(None, named), VOCABULARY - 1))

    def row(self, tail: int, start: int = 20) -> list[int]:
        """Return the token ids of a prompt with one image and so many tokens behind it."""
        if "input_ids" not in self.arguments:
            raise ValueError(f"{type(self.model).__name__} reads no prompt")
        self.image(0)
        before = [token for token in (9, 10, 11) if token != self.image_token][:2]
        return [*before, *[self.image_token] * self._count, *(start + 7 * i % 200 for i in range(tail))]

    def batch(self, rows: Sequence[list[int]], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the arguments of the model for prompts, padded as a run does, each about the image of its seed."""
        width = max(map(len, rows))
        side = -1 if self.model.config.is_encoder_decoder else 1
        ids = torch.tensor([([PAD] * (width - len(row)) + row[::side])[::side] for row in rows])
        mask = torch.tensor([([0] * (width - len(row)) + [1] * len(row))[::side] for row in rows])
        images = [self.image(seed) for seed in seeds]
        inputs = {name: torch.cat(self._values(name, images), self._side_by_side(name)) for name in images[0]}
        marks = (ids == self.image_token).long()
        marked = {name: marks for name in ("mm_token_type_ids", "token_type_ids") if name in self.arguments}
        if "image_embeds_position_mask" in self.arguments:
            marked["image_embeds_position_mask"] = marks.bool()
        return {"input_ids": ids, "attention_mask": mask, **inputs, **marked}

    @property
    def answer(self) -> dict[str, torch.Tensor]:
        """The beginning of an answer, where that is not read behind the prompt."""
        return {"decoder_input_ids": torch.tensor([[5, 6]])} if self.model.config.is_encoder_decoder else {}

    @staticmethod
    def _values(name: str, images: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Return an argument of every image; places of patches count those of all images before."""
        patches = images[0]["pixel_values"].shape[:-1].numel() if name == "image_token_pooling" else 0
        return [image[name] + patches * number if patches else image[name] for number, image in enumerate(images)]

    def _side_by_side(self, name: str) -> int:
        """Return the dimension along which images stand: the last for one long strip of patches, else the first."""
        return -1 if name == "pixel_values" and "target_sizes" in self.arguments else 0

    @torch.no_grad()
    def _tokens(self, image: Mapping[str, torch.Tensor]) -> int:
        """Return how many positions of a prompt an image takes."""
        reader = next((part for part in self.model.modules() if hasattr(part, "get_image_features")), None)
        features = None if reader is None else reader.get_image_features(**image)
        if (queries := getattr(self.model.config, "num_query_tokens", None)) is not None:
            pixels = image["pixel_values"]
            return int(queries) * (pixels.shape[1] if pixels.ndim == VIDEO_DIMENSIONS else 1)
        if features is None:
            return int(hasattr(self.model.config, "image_token_id"))
        pooled = getattr(features, "pooler_output", None)
        if pooled is None and (levels := getattr(features, "deepstack_features", None)) is not None:
            # Each level, behind the number of its layer, takes the same positions.
            pooled = levels[0][1]
        features = getattr(features, "last_hidden_state", features) if pooled is None else pooled
        if isinstance(features, list | tuple):
            features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        return int(features.reshape(-1, features.shape[-1]).shape[0])

    def _ways(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the ways in which families are given an image, likeliest first."""
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random)

        config = self.model.config
        vision = next((part for part in parts_of(config) if hasattr(part, "patch_size") and part is not config), None)
        vision = getattr(config, "vision_config", None) or vision
        patch = getattr(vision, "patch_size", None)
        side = getattr(vision, "image_size", None) or IMAGE_SIZE
        side = side if isinstance(side, int) else side[0]
        high_side = getattr(getattr(config, "high_res_vision_config", None), "image_size", side)
        ways: list[dict[str, torch.Tensor]] = []
        if self.family in IMAGES:
            ways.append(IMAGES[self.family](draw, self.model.config))
        if isinstance(patch, int):
            grid = torch.tensor([[1, 4, 4]])
            for frames in (getattr(vision, "temporal_patch_size", 1), 1):
                ways.append({"pixel_values": draw(16, CHANNELS * frames * patch**2), "image_grid_thw": grid})
            ways.append({"pixel_values": draw(16, CHANNELS, patch, patch), "image_grid_thw": grid})
        size = torch.tensor([[side, side]])
        picture = draw(1, CHANNELS, side, side)
        tiles = draw(1, 2, CHANNELS, side, side)
        ways += [
            {"pixel_values": picture},
            {"pixel_values": picture, "image_sizes": size},
            {"pixel_values": tiles, "image_sizes": size},
            {"pixel_values": picture[:, None]},
            {"pixel_values_images": picture},
            {"pixel_values": picture[:, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)},
            {"pixel_values": picture, "qformer_input_ids": torch.tensor([[5, 6, 7]])},
            {"pixel_values": picture, "high_res_pixel_values": draw(1, CHANNELS, high_side, high_side)},
        ]
        if isinstance(patch, int):
            flat, places = draw(16, CHANNELS * patch**2), torch.cartesian_prod(torch.arange(6), torch.arange(6))
            merged = patch * getattr(vision, "spatial_merge_size", 1)
            frames = getattr(vision, "patch_temporal", 1)
            ways += [
                {"pixel_values": draw(4, merged, merged, CHANNELS), "image_grid_thw": torch.tensor([[1, 2, 2]])},
                {"pixel_values": flat, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([2])},
                {"pixel_values": flat, "image_grid_hw": grid[:, 1:]},
                {"pixel_values": draw(1, 36, CHANNELS * patch**2), "image_position_ids": places[None]},
                {"pixel_values": draw(1, CHANNELS, patch, 64 * patch), "target_sizes": torch.tensor([[8, 8]])},
                {"pixel_values": draw(16, CHANNELS * frames * patch**2), "image_grid_thw": grid},
            ]
        yield from (way for way in ways if self._demanded <= set(way) <= self.arguments)


Draw = Callable[..., torch.Tensor]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA = {
    "num_hidden_layers": LAYERS,
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {1: {"head_dim": 32}},
}
PARTS: Mapping[str, Mapping[str, Any]] = {
    **{key: {"text_config": _GEMMA, "vision_config": {}} for key in ("gemma4", "gemma4_unified")},
    "diffusion_gemma": {"text_config": {**_GEMMA, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots3_note": {
        "vision_config": {"num_hidden_layers": LAYERS, "mlp_layer_types": ["dense", "sparse"]},
        "text_config": {
            "num_hidden_layers": LAYERS,
            **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
            **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank"), 32),
            "layer_types": ["indexed_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "head_dim": 16,
        }
    },
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "image_grid_pinpoints": [[64, 64]],
        "vision_config": {"image_size": 64, "patch_size": 8},
    },
    "inkling_mm_model": {"vision_config": {"n_layers": LAYERS, "patch_size": 8}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "fast_vlm": {
        "vision_config": {
            "architecture": "fastvit_mci3",
            "hidden_size": 64,
            "model_args": {"layers": [1] * 5, "embed_dims": [16, 16, 32, 32, 64], "inference_mode": True},
        }
    },
    "apertus1p5": {
        "vision_config": {"codebook_size": 64},
        "audio_config": {"codebook_size": 64},
        "image_token_offset": 256,
        "audio_token_offset": 320,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": VOCABULARY - 1,
            "<|extra_200|>": 400,
            **{f"<|visual token {code:06}|>": 300 + code for code in range(8)},
        },
        "vq_config": {"codebook_size": 8, "hidden_size": 32, "channel_multiplier": [1, 1, 1, 1]},
    },
    "aria": {"projector_patch_to_query_dict": {49: 8}},
    "gemma3n": {"vision_config": {"model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 2}}},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 64,
                "depth": LAYERS,
                "num_heads": 4,
                "img_size": [IMAGE_SIZE, IMAGE_SIZE],
                "ref_feat_shape": [4, 4],
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
            },
        }
    },
    "chameleon": {
        "vocabulary_map": {
            "<image>": VOCABULARY - 1,
            **{f"IMGIMG{digit}Z": 300 + i for i, digit in enumerate("ABCDEFGH")},
        },
        "vq_config": {
            "embed_dim": 32,
            "num_embeddings": 8,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
        },
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "deepseek_ocr2": {
        "text_config": {"num_hidden_layers": LAYERS, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
}
"""Family -> parts of its configuration that have no default, or none that sizes by name make small."""

CHANGES: Mapping[str, Mapping[str, Any]] = {
    **{
        family: {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
        for family in ("glm4v", "glm46v", "glmga", "glm_ocr", "qwen2_vl", "qwen2_5_vl", "paddleocr_vl")
    },
    "fast_vlm": {"vision_config.hidden_size": 128},
    # Where its tower halves an image: behind a layer that the tiny one has.
    **{key: {"vision_config.insert_layer_id": 0} for key in ("minicpmv4_6", "minicpmv4_7")},
    "apertus1p5": {"audio_config.codebook_dim": 64},
    "llama4": {"vision_config.intermediate_size": 256},
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0, 1]},
    **{key: {"vision_config.sam_config.downsample_channels": [64, 64]} for key in ("deepseek_ocr2", "unlimited_ocr")},
    **{key: {"out_hidden_size": 4 * 64} for key in ("muse_glimmer", "muse_spark")},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "step3p7": {"vision_config.mlp_ratio": 2.0, "text_config.sliding_window": 64},
    "minimax_m3_vl": {"merged_hidden_size": 4 * 64},
    "hunyuan_vl": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]},
    },
    "glm4v_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    **{key: {"vision_config.image_size": 256} for key in ("idefics3", "smolvlm")},
    **{key: {"mm_tokens_per_image": 4} for key in ("gemma3", "shieldgemma2")},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 400},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 400,
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]},
    },
    "gemma3n": {"vision_soft_tokens_per_image": 4, "vision_config.hidden_size": 2048},
    "vipllava": {"vision_feature_layer": [-2, -1]},
    "mllama": {
        "text_config.cross_attention_layers": [1],
        "vision_config.num_global_layers": LAYERS,
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 3 * 64,
    },
    **{
        key: {"image_grid_pinpoints": [[112, 112], [112, 224]]}
        for key in ("llava_next", "llava_next_video", "llava_onevision")
    },
}
"""Family -> what its configuration wants beyond sizes by name."""


def _idefics(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    side = config.vision_config.image_size
    mask = torch.ones(1, 1, side, side, dtype=torch.bool)
    return {"pixel_values": draw(1, 1, CHANNELS, side, side), "pixel_attention_mask": mask}


def _fuyu(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": draw(1, 4, CHANNELS * config.patch_size**2)}


def _shaped(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    patches = draw(1, 16, CHANNELS * config.vision_config.patch_size**2)
    return {
        "pixel_values": patches,
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def _flattened(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    """Patches behind their row and column, from 1."""
    places = 1 + torch.cartesian_prod(torch.arange(6), torch.arange(6))
    patches = draw(1, 36, config.vision_config.patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([places[None], patches], dim=-1)}


def _inkling(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    return {"pixel_values": draw(4, vision.temporal_patch_size, vision.patch_size, vision.patch_size, CHANNELS)}


def _molmo2(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    """Four tokens of four patches each, from a picture in low resolution alone."""
    vision = config.vision_config
    return {
        "pixel_values": draw(1, vision.num_position_embeddings, CHANNELS * vision.patch_size**2),
        "image_token_pooling": torch.arange(16).reshape(4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def _merged(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    return {
        "pixel_values": draw(1, 4, CHANNELS * config.vision_config.model_patch_size**2),
        "image_position_ids": places[None],
    }


def _instructblipvideo(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    side = config.vision_config.image_size
    return {"pixel_values": draw(1, 4, CHANNELS, side, side), "qformer_input_ids": torch.tensor([[5, 6, 7]])}


def _mllama(draw: Draw, config: Any) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    tiles = draw(1, 1, vision.max_num_tiles, CHANNELS, vision.image_size, vision.image_size)
    mask = torch.ones(1, 1, vision.max_num_tiles, dtype=torch.long)
    return {"pixel_values": tiles, "aspect_ratio_ids": torch.tensor([[6]]), "aspect_ratio_mask": mask}


IMAGES: Mapping[str, Callable[[Draw, Any], dict[str, torch.Tensor]]] = {
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    "fuyu": _fuyu,
    "lfm2_vl": _shaped,
    "mllama": _mllama,
    "gemma4_unified": _merged,
    "kosmos-2.5": _flattened,
    "inkling_mm_model": _inkling,
    "molmo2": _molmo2,
    "instructblipvideo": _instructblipvideo,
}
"""Family -> how it is given an image, where that is a way of its own."""


class Row(NamedTuple):
    """What became of a family.

    Attributes:
        parts: linear layers of each component; why there are none where it cannot be split.
        none: loaded as it was saved.
        rtn: four bits while loading.
        awq: four bits with calibration.
        batch: four prompts in one padded batch against each alone.
        prefix: questions over one encoding of their image against each with its own.
    """

    parts: str
    none: str = ""
    rtn: str = ""
    awq: str = ""
    batch: str = ""
    prefix: str = ""


TAILS = (5, 9, 14, 9)
"""Tokens behind the image of the four prompts that every family is asked."""

PLAN = QuantPlan.from_arguments(bits=4, group_size=32)


def examine(family: str, folder: Path) -> Row:
    """Take a family through everything that does not need its processor.

    Args:
        family: of `FAMILIES`.
        folder: for its checkpoint.
    """
    try:
        tiny = Tiny(family)
        tiny.model.save_pretrained(folder)
        AutoModelForImageTextToText.from_pretrained(folder)
    except Exception as error:
        return Row(f"not built: {_line(error)}")
    try:
        counts = Counter(components(tiny.model).values())
        loaded = load(folder, "none")
    except ValueError as error:
        return Row(f"refused: {_line(error)}")
    saved = dict(tiny.model.named_parameters())
    same = all(torch.equal(parameter, saved[name]) for name, parameter in loaded.named_parameters())
    row = Row(
        ", ".join(f"{part} {counts[part]}" for part in (*COMPONENTS, "audio", "unused") if counts[part]),
        none="works" if same else "differs",
        rtn=_outcome(lambda: load(folder, "rtn")),
    )
    try:
        _decoder(tiny)
        rows = [tiny.row(tail, 20 + tail) for tail in TAILS]
        alone = [tiny.batch([one], [seed]) for seed, one in enumerate(rows)]
        together = tiny.batch(rows, range(len(rows)))
        forced = [inputs | tiny.answer | {"use_cache": False} for inputs in alone]
        with torch.no_grad():
            tiny.model(**forced[0])
    except Exception as error:
        return row._replace(awq=f"not tried: {_line(error)}")
    return row._replace(
        awq=_outcome(lambda: quantize(loaded, get("awq"), PLAN, forced)),
        batch=_outcome(lambda: _batched(tiny, alone, together)),
        prefix=_outcome(lambda: _shared(tiny, alone, rows)),
    )


def load(folder: Path, method: str) -> Any:
    """Load a tiny checkpoint as a user's would be, but for its processor, of which a tokenizer takes the place."""
    plan, given = QuantPlan() if method == "none" else PLAN, _tokenizer()
    return load_quantized(str(folder), backend=get(method), plan=plan, dtype=torch.float32, processor=given).model


def _tokenizer() -> Any:
    return byte_level_tokenizer(("</s>", "<pad>"), eos_token="</s>", pad_token="<pad>")


def _decoder(tiny: Tiny) -> Decoder:
    return Decoder.of(tiny.model, _tokenizer())


def _batched(tiny: Tiny, alone: list[dict[str, torch.Tensor]], together: dict[str, torch.Tensor]) -> str | None:
    """Answer the prompts together, and if that is not as alone, those of equal length, each with its own image."""
    if padded_difference(_decoder(tiny), list(alone), together) is None:
        return None
    rows, seeds = [tiny.row(TAILS[0], 20 + number) for number in range(len(TAILS))], range(len(TAILS))
    equal = [tiny.batch([row], [seed]) for row, seed in zip(rows, seeds, strict=True)]
    if padded_difference(_decoder(tiny), equal, tiny.batch(rows, seeds)) is None:
        return "by length: padding changes the answer"
    return "one at a time: other rows of a batch change the answer"


def _shared(tiny: Tiny, alone: list[dict[str, torch.Tensor]], rows: list[list[int]]) -> str | None:
    """Share the first image among all prompts."""
    sharing = PrefixSharing.of(_decoder(tiny))
    if sharing.off is not None:
        return f"plain way: {sharing.off}"
    encoded = Encoded(Batch(alone[0], [None]), [rows])
    plain = [tiny.batch([one], [0]) for one in rows]
    try:
        shared = sharing.lay_out(encoded, GenerationSettings(max_new_tokens=8))
        difference = sharing.verify(shared, plain, 2**30)
    except NotShareable as reason:
        return f"plain way: {re.sub(r' [(]keys.*', '', str(reason))}"
    return None if difference is None else "plain way: the self-check finds a difference"


def _outcome(attempt: Callable[[], Any]) -> str:
    try:
        result = attempt()
    except Exception as error:
        return f"refused: {_line(error)}"
    return result if isinstance(result, str) else "works"


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error) else ""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}{_raised_in(error)}: "
    return re.sub(r"\s+", " ", kind + re.sub(r"\S*/(tmp|pytest)\S*", "the checkpoint", text))[:200].replace("|", "/")


def _raised_in(error: Exception) -> str:
    """Say which part of a model raised an error; "" if none did."""
    frames = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
    raiser = frames[-1].get("self") if frames else None
    return f" in {type(raiser).__name__}" if isinstance(raiser, PreTrainedModel) else ""


PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEADER = """# Families

Every family of transformers' image-text-to-text mapping, as a tiny model with random weights: its default configuration
with sizes shrunk by the names of its attributes, saved, loaded by `quant_none`, quantized to 4 bits while loading
(`quant_rtn`) and with calibration (`quant_awq`), four prompts of different length in one padded batch against each
alone, and four questions over one encoding of their image against each with its own. Prompts and pixels are made by
hand, below the level of processors; "not tried" stands where they could not be, "not built" where the default
configuration gives no tiny model that transformers itself saves and reads back; both name the class of transformers
that raises the error, where one does (Llama 4 of transformers 5.24 asks its decoder for image outputs that it does not
give, so that no prompt about an image is answered). Families with a processor in `tests/helpers/families.py` go through
`lmms-eval`'s model in other tests. "One at a time", "by length" (batches without padding) and "plain way" are what a
run falls back to by itself, with a line in its log; HunYuan-VL's positions number the images of a batch through.
How a family is asked for boxes, and the source of that or where one was looked for, stands in [dialects](dialects.md);
a family without an entry there is asked for fractions, and no source was looked for.

`python tests/helpers/small_families.py` writes this page anew; `tests/end_to_end/test_all_families.py` compares it
family by family.

| family | linear layers | none | rtn | awq | batch of 4 | shared prefix |
|---|---|---|---|---|---|---|
"""


def line(family: str, row: Row) -> str:
    """Return a family's line of the page."""
    return f"| {family} | {' | '.join(cell or '-' for cell in row)} |"


def write_page() -> None:
    """Examine every family and write the page."""
    lines = []
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            lines.append(line(family, examine(family, Path(folder))))
        print(lines[-1], flush=True)
    PAGE.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_page()
