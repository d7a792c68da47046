"""Blocks of families that nobody here had in mind: resamplers, cross attention, query transformers, lists of tiles."""

import copy

import pytest
import torch
import transformers as hf
from helpers.recorder import SPEC, Recorder, plain_sums
from helpers.small_families import Tiny, load
from torch import nn

from lmms_plugin.quant_backends.calibration.sequential import SequentialQuantizer
from lmms_plugin.quant_backends.structure.blocks import find_blocks

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
IMAGE = 100


def ids(image_tokens, seed):
    return torch.tensor([[1] + [IMAGE] * image_tokens + list(range(3, 8 + seed))])


def llava_next():
    clip = {"model_type": "clip_vision_model", **VISION, "projection_dim": 64}
    config = hf.LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=clip,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32], [32, 64]],
    )
    sizes = torch.tensor([[32, 32]])
    # Sixteen patches of the whole image and of its one tile, four line ends.
    return hf.LlavaNextForConditionalGeneration(config), lambda seed: {
        "input_ids": ids(36, seed),
        "pixel_values": torch.randn(1, 2, 3, 32, 32),
        "image_sizes": sizes,
    }


def idefics2():
    perceiver = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2}
    config = hf.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        vision_config=VISION,
        perceiver_config=perceiver | {"num_key_value_heads": 1, "resampler_head_dim": 16},
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config), lambda seed: {
        "input_ids": ids(4, seed),
        "pixel_values": torch.randn(1, 1, 3, 32, 32),
    }


def mllama():
    text = {**TEXT, "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 32, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 192}
    vision |= {"intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [[1, 1]]}
    config = hf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)

    def batch(seed):
        tokens = ids(1, seed)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": torch.randn(1, 1, 1, 3, 32, 32),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, tokens.shape[1], 1, 1, dtype=torch.long),
        }

    return hf.MllamaForConditionalGeneration(config), batch


def mistral3():
    config = hf.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 32},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return hf.Mistral3ForConditionalGeneration(config), lambda seed: {
        "input_ids": ids(4, seed),
        "pixel_values": torch.randn(1, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]]),
    }


def aya_vision():
    config = hf.AyaVisionConfig(
        text_config={"model_type": "cohere2", **TEXT, "sliding_window": 8},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=IMAGE,
        downsample_factor=2,
    )
    return hf.AyaVisionForConditionalGeneration(config), lambda seed: {
        "input_ids": ids(4, seed),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


def instructblip():
    former = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    former |= {"intermediate_size": 128, "encoder_hidden_size": 64, "cross_attention_frequency": 2}
    config = hf.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=former,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        num_query_tokens=4,
    )

    def batch(seed):
        tokens = ids(4, seed)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "qformer_input_ids": torch.tensor([[1, 4, 5]]),
            "qformer_attention_mask": torch.ones(1, 3, dtype=torch.long),
            "pixel_values": torch.randn(1, 3, 32, 32),
        }

    return hf.InstructBlipForConditionalGeneration(config), batch


@pytest.mark.parametrize("build", [llava_next, idefics2, mllama, mistral3, aya_vision, instructblip])
def test_every_layer_gets_the_statistics_of_plain_forward_passes(build):
    torch.manual_seed(0)
    model, batch = build()
    model.eval()
    batches = [batch(seed) for seed in range(3)]
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    expected = plain_sums(copy.deepcopy(model), names, batches)
    backend, put = Recorder(), {}
    SequentialQuantizer(model, backend, dict.fromkeys(names, SPEC), put.__setitem__).run(batches)
    assert set(put) == set(names)
    assert set(backend.seen) == set(expected)
    for name, (gram, _, rows) in expected.items():
        assert backend.seen[name].rows == rows
        torch.testing.assert_close(
            backend.seen[name].gram.double(), gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()), msg=name
        )
    # One by one, in as many blocks as there are transformer layers, connector and output projection.
    assert sum(bool(inside) for inside in find_blocks(model, tuple(names)).values()) >= 8


def test_a_layer_that_gives_its_weight_to_another_is_refused(tmp_path):
    tiny = Tiny("diffusion_gemma")
    tiny.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.\S+ and model\.encoder\S+ share one weight"):
        load(tmp_path, "rtn")
    assert type(load(tmp_path, "none")) is type(tiny.model)
