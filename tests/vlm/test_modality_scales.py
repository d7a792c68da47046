"""Answers with static scales per modality: whatever the batch, its padding and shared prefixes, and once saved."""

import pytest
import torch
from helpers.prefix import IMAGES, QUESTIONS, Documents, answers, ask, assert_equal, plainly

from bench import activation_scales
from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.protocol.response import Response
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.held_out import output_errors
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.layers.modalities import image_rows
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundsInputs
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.vlm import wrapper as models

pytestmark = pytest.mark.model
FAMILIES = ("smolvlm", "qwen2_5_vl", "llava")
ARGUMENTS = {
    "bits": 8,
    "group_size": -1,
    "symmetric": True,
    "vision_bits": 8,
    "connector_bits": 8,
    "activation_format": "int8",
    "activation_granularity": "modality",
    "calibration": "noise:n=2",
    "device": "cpu",
}


def load(path, kind=models.QuantGptq, **changes):
    vlm = kind(pretrained=str(path), **{**ARGUMENTS, **changes})
    vlm.task_dict = {"toy": {"test": Documents(QUESTIONS)}}
    # What does not fit the model is found when it is loaded.
    return vlm.make_ready()


def assert_near(ours, theirs):
    """The first tokens have the same probability, up to the step of a number that lies on the edge of two codes."""
    for one, other in zip(ours, theirs, strict=True):
        assert Response.decode(one).tokens[0].logprob == pytest.approx(
            Response.decode(other).tokens[0].logprob, abs=0.02
        )


def scaled(model):
    """The layers with scales per modality, and those with one."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, RoundsInputs)}
    apart = {name for name, one in layers.items() if one.rounding.by_modality}
    return apart, layers.keys() - apart


@pytest.fixture(scope="module")
def vlms(checkpoint):
    loaded = {}

    def of(family):
        if family not in loaded:
            loaded[family] = load(checkpoint(family))
        vlm = loaded[family]
        vlm.responder.engine.runner.sharing.verified, vlm.responder.engine.runner.sharing.off = False, None
        return vlm

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_decoder_are_scaled_apart_and_no_others(vlms, family):
    apart, together = scaled(vlms(family).model)
    assert apart
    assert together
    assert all("language_model" in name or "text_model" in name for name in apart)
    assert all("vis" in name or "connector" in name or "projector" in name for name in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_in_every_batch_and_over_shared_prefixes(vlms, family):
    vlm = vlms(family)
    with plainly(vlm):
        expected = answers(vlm, 1)
        assert_near(answers(vlm, 8), expected)
    assert_near(answers(vlm, 8), expected)
    assert vlm.responder.engine.runner.sharing.off is None


@pytest.mark.parametrize("family", ["smolvlm", "llava"])
def test_layers_are_told_the_image_tokens_of_each_pass(vlms, family):
    """Over shared prefixes: images come with prefixes, and what follows them is text."""
    vlm = vlms(family)
    # What the first batch is compared with is no part of answering.
    answers(vlm, 8)
    seen = []
    name = next(name for name in sorted(scaled(vlm.model)[0]) if name.endswith("0.mlp.down_proj"))
    handle = vlm.model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append((args[0].shape[:2], int(image_rows(args[0]).sum())))
    )
    prompts = [vlm.reader.read(ask((index, "x")), "question") for index in range(len(IMAGES))]
    expected = int((vlm.chat.encode(prompts).inputs["input_ids"] == vlm.model.config.image_token_id).sum())
    try:
        answers(vlm, 8)
    finally:
        handle.remove()
    assert sum(count for _, count in seen) == expected
    assert all(count == 0 for (_, columns), count in seen if columns == 1)


@torch.no_grad()
def test_a_saved_model_answers_as_before(vlms, checkpoint, tmp_path):
    vlm = load(checkpoint("smolvlm"), save_quantized=str(tmp_path / "saved"))
    again = models.QuantPrequantized(pretrained=str(tmp_path / "saved"), device="cpu")
    again.task_dict = vlm.task_dict
    assert_equal(answers(again), answers(vlm))
    assert scaled(again.model) == scaled(vlm.model)


def test_errors_on_held_out_inputs_are_those_of_the_layers_as_they_run(vlms, checkpoint):
    model = vlms("smolvlm").model
    dense = load_quantized(str(checkpoint("smolvlm")), backend=get("none"), plan=QuantPlan(), dtype=torch.float32)
    spec = CalibrationSpec("noise", samples=1, seed=3)
    batches, _ = build_batches(
        dense.model, dense.processor, spec, spec.load_samples(), dialect_for("smolvlm"), keep_logits=False
    )
    apart, together = scaled(model)
    errors = output_errors(dense.model, model, [*apart, *together], batches)
    assert all(error is not None and 0 < error < 0.2 for error in errors.values())
    # Nothing of it stays in the unquantized model.
    assert not dense.model._forward_pre_hooks


@torch.no_grad()
def test_sequential_calibration_tells_quantized_blocks_the_images_of_each_sample(checkpoint):
    """With quantized blocks in between, the layers of the second block see what the first really puts out."""
    options = {"activation_format": "int8", "activation_granularity": "modality"}
    plan = QuantPlan.from_arguments(bits=8, group_size=-1, symmetric=True, vision_bits=16, connector_bits=16)
    spec = CalibrationSpec("noise", samples=2)
    given = {"plan": plan, "calibration": spec, "dtype": torch.float32}
    found = load_quantized(str(checkpoint("smolvlm")), backend=get("gptaq", **options), **given)
    name = next(name for name in sorted(scaled(found.model)[0]) if name.endswith("layers.1.self_attn.q_proj"))
    batches, _ = build_batches(
        found.model, found.processor, spec, spec.load_samples(), dialect_for("smolvlm"), keep_logits=False
    )
    largest = torch.zeros(2)

    def note(_, args):
        is_image = image_rows(args[0])
        rows = args[0].reshape(len(is_image), -1).abs()
        for place, inside in enumerate((is_image, ~is_image)):
            largest[place] = torch.maximum(largest[place], rows[inside].max())

    handle = found.model.get_submodule(name).register_forward_pre_hook(note)
    for batch in batches:
        found.model(**{key: value for key, value in batch.items() if key != "token_roles"})
    handle.remove()
    assert torch.allclose(found.model.get_submodule(name).static_scale * 127, largest, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("blip2_opt", "its generate reads the prompt past its own"), ("blip2_t5", "it is an encoder-decoder")],
)
def test_families_that_do_not_tell_are_refused(checkpoint, family, reason):
    with pytest.raises(ValueError, match=rf"activation_granularity=modality: .* does not tell .*{reason}"):
        load(checkpoint(family))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_demo_answers_as_without_quantization_up_to_rounding(bits):
    """End to end: the tokens of answers that the unquantized model would write, of scenes that no calibration saw."""
    dense = load_quantized(str(CHECKPOINT), backend=get("none"), plan=QuantPlan(), dtype=torch.float32)
    batches = activation_scales.batches_of(dense, "demo:n=12")
    exact = activation_scales.at_answers(dense.model, batches[8:])
    plan = QuantPlan.from_arguments(
        bits=bits, group_size=-1 if bits == 8 else 32, symmetric=True, vision_bits=bits, connector_bits=bits
    )
    backend = get("gptq", activation_format="int8", activation_granularity="modality")
    quantize(dense.model, backend, plan, batches[:8])
    found = activation_scales.at_answers(dense.model, batches[8:])
    same = torch.cat([one.argmax(1) == two.argmax(1) for one, two in zip(exact, found, strict=True)])
    assert float(same.float().mean()) > 0.8
    assert 0 < activation_scales.relative(exact, found) < 0.6
