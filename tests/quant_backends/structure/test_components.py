"""Components of architectures as transformers defines them, at full size but without memory for any weight."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec, Rule
from lmms_plugin.quant_backends.quantization import Quantization
from lmms_plugin.quant_backends.structure.components import components, splitter
from lmms_plugin.quant_backends.structure.roles import find_places

PARTS = {
    "blip": {
        "vision_model.encoder": "vision",
        "text_decoder.bert": "language",
        "text_decoder.cls.predictions.decoder": "head",
    },
    "deepseek_vl_hybrid": {
        "model.vision_model": "vision",
        "model.high_res_vision_model": "vision",
        "model.aligner": "connector",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "video_llava": {
        "model.image_tower": "vision",
        "model.video_tower": "vision",
        "model.multi_modal_projector": "connector",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "qwen2_5_omni_thinker": {
        "model.visual.blocks": "vision",
        "model.visual.merger": "connector",
        "model.audio_tower": "audio",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "nemotron_h_omni": {
        "vision_model": "vision",
        "multi_modal_projector": "connector",
        "language_model.model": "language",
        "language_model.lm_head": "head",
    },
    "blip-2": {
        "vision_model": "vision",
        "qformer": "connector",
        "language_projection": "connector",
        "language_model.model.decoder.layers": "language",
        "language_model.lm_head": "head",
    },
    "janus": {
        "model.vision_model": "vision",
        "model.aligner": "connector",
        "model.generation_aligner": "unused",
        "model.generation_head": "unused",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "ovis2": {
        "model.vision_tower.transformer": "vision",
        "model.vision_tower.head_linear": "connector",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "granite_docling": {
        "model.vision_model.encoder": "vision",
        "model.vision_model.connector": "connector",
        "model.text_model": "language",
        "lm_head": "head",
    },
    "llama4": {
        "vision_model.model": "vision",
        "vision_model.vision_adapter": "connector",
        "multi_modal_projector": "connector",
        "language_model.model": "language",
        "language_model.lm_head": "head",
    },
    "mllama": {
        "model.vision_model.transformer": "vision",
        "model.vision_model.global_transformer": "vision",
        "model.multi_modal_projector": "connector",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "lfm2_vl": {
        "model.vision_tower.head": "vision",
        "model.multi_modal_projector": "connector",
        "model.language_model": "language",
        "lm_head": "head",
    },
    "fuyu": {
        "model.vision_embed_tokens": "connector",
        "model.language_model": "language",
        "lm_head": "head",
    },
}
"""Family -> beginning of module names -> component."""


def built(family):
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))


@pytest.fixture
def parts(request):
    return components(built(request.param))


@pytest.mark.parametrize(("parts", "expected"), PARTS.items(), ids=PARTS, indirect=["parts"])
def test_every_layer_is_in_the_part_that_its_family_means(parts, expected):
    """A second tower is vision, an output projection within the decoder is the head, what hears is no connector."""
    for beginning, component in expected.items():
        found = {parts[name] for name in parts if name == beginning or name.startswith(f"{beginning}.")}
        assert found == {component}, beginning
    assert set(expected.values()) == set(parts.values())


@pytest.mark.parametrize("family", ["idefics", "git", "pi0", "mistral4", "udop"])
def test_a_family_that_cannot_be_split_is_refused_in_a_line_that_names_its_parts(family):
    """The vision tower lies within what is called the decoder, or there is none."""
    with pytest.raises(ValueError, match=r"cannot split \w+ into vision tower and decoder .* among .*: \w+") as failure:
        splitter(built(family))
    assert "\n" not in str(failure.value)


@pytest.mark.slow
def test_elements_of_a_list_that_are_layers_are_no_blocks():
    """Gemma 3n keeps projections in lists, as it keeps its blocks."""
    model = built("gemma3n")
    parts = components(model)
    places = find_places(model, parts)
    alone = [name for name in parts if name.startswith("model.language_model.altup_projections.")]
    assert alone
    assert not set(alone) & set(places)
    assert {place.block for place in places.values()} == set(range(model.config.text_config.num_hidden_layers))
    work = Quantization(model, get("none"), QuantPlan())
    assert set(work.reasons) == set(parts)


def test_an_audio_tower_is_touched_by_rules_alone():
    layers = {
        "visual.fc": "vision",
        "audio.fc": "audio",
        "visual.merger": "connector",
        "layers.fc": "language",
        "lm_head": "head",
    }
    everything = QuantPlan.from_arguments(bits=4, vision_bits=8, connector_bits=8, head_bits=8)
    assigned = everything.assign(layers)
    assert set(layers) - set(assigned.specs) == {"audio.fc"}
    assert assigned.reasons == {"audio.fc": "the plan leaves audio at 16 bits"}
    ruled = QuantPlan(language=QuantSpec(4), rules=(Rule("audio", QuantSpec(8)),)).assign(layers)
    assert ruled.specs["audio.fc"] == QuantSpec(8)
