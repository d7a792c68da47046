"""Input scales that other layers take over: not one bit of any answer may change."""

import pytest
import torch
from PIL import Image

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import encode, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.folding import fold
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.methods.scale_search import candidates
from lmms_plugin.quant_backends.plans.plan import QuantPlan

FED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))


def load(path, method="rtn", dtype=torch.float32, calibration=None, **options):
    plan = QuantPlan.from_arguments(bits=4, group_size=32)
    backend = get(method, **options)
    return load_quantized(str(path), backend=backend, plan=plan, dtype=dtype, calibration=calibration)


def inputs_of(loaded, size=(64, 48)):
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    return {**to_model(encode(loaded.processor, image, "Where?"), loaded.model), "use_cache": False}


def scale_inputs(model, groups=FED_TOGETHER, seed=0):
    """Give layers that are fed together an input scale of powers of two, as a search would."""
    random = torch.Generator().manual_seed(seed)
    scaled = []
    for parent_name, parent in list(model.named_modules()):
        for group in groups:
            layers = [getattr(parent, name, None) for name in group]
            if not all(isinstance(layer, PackedLinear) for layer in layers):
                continue
            scale = torch.randint(-2, 3, (layers[0].in_features,), generator=random).to(layers[0].dtype).exp2()
            for name, layer in zip(group, layers, strict=True):
                layer.in_scale = scale.clone()
                scaled.append(f"{parent_name}.{name}")
    return scaled


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_every_scale_goes_and_no_bit_changes(checkpoint, family, dtype):
    loaded = load(checkpoint(family), dtype=dtype)
    assert len(scale_inputs(loaded.model)) >= 12
    # Another picture and another question than those that are looked at while folding.
    other = inputs_of(loaded, (48, 80))
    before = loaded.model(**other).logits
    assert fold(loaded.model, inputs_of(loaded)) == ()
    assert all(layer.in_scale is None for layer in loaded.model.modules() if isinstance(layer, PackedLinear))
    assert torch.equal(loaded.model(**other).logits, before)


@torch.no_grad()
def test_a_norm_that_would_round_keeps_its_layers_scales(checkpoint):
    """Gemma's norms multiply by one plus their weight."""
    loaded = load(checkpoint("gemma3"))
    scaled = scale_inputs(loaded.model)
    before = loaded.model(**inputs_of(loaded)).logits
    kept = fold(loaded.model, inputs_of(loaded))
    assert set(kept) == {name for name in scaled if not name.endswith("down_proj")}
    assert torch.equal(loaded.model(**inputs_of(loaded)).logits, before)


@torch.no_grad()
def test_layers_that_differ_keep_their_scales(checkpoint):
    """What one norm feeds must multiply by the same numbers; attention's output has nothing before it that could."""
    loaded = load(checkpoint("qwen2_5_vl"))
    scaled = [*scale_inputs(loaded.model, (("q_proj",),)), *scale_inputs(loaded.model, (("o_proj",),), seed=1)]
    before = loaded.model(**inputs_of(loaded)).logits
    assert set(fold(loaded.model, inputs_of(loaded))) == set(scaled)
    assert torch.equal(loaded.model(**inputs_of(loaded)).logits, before)


def test_scales_of_a_search_are_powers_of_two():
    magnitude = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 10
    found = candidates(magnitude, torch.bfloat16, powers_of_two=True)
    assert torch.equal(found.log2().round().exp2(), found)
    assert torch.equal(found[0], torch.ones(64))
    assert found[-1].unique().numel() > 2
    free = candidates(magnitude, torch.float32)
    assert ((found / free).log2().abs() <= 0.5 + 1e-3).all()


def test_folded_awq_is_compressed_tensors_and_comes_back_bit_for_bit(tmp_path):
    from lmms_plugin.demo import CHECKPOINT

    calibration = CalibrationSpec("noise", samples=2)
    first = load(CHECKPOINT, "awq", calibration=calibration, fold=True)
    scaled = [layer for layer in first.model.modules() if getattr(layer, "in_scale", None) is not None]
    assert any((layer.in_scale != 1).any() for layer in scaled), "a trained model has columns that matter more"
    with torch.no_grad():
        before = first.model(**inputs_of(first)).logits
        saved = save_quantized(
            first.model, first.processor, first.report, tmp_path / "saved", form="compressed-tensors"
        )
        assert (saved.format, saved.reason, saved.schemes) == ("compressed-tensors", None, 1)
        again = load_quantized(str(tmp_path / "saved"), backend=get("prequantized"), plan=QuantPlan())
        assert torch.equal(again.model(**inputs_of(first)).logits, before)


def test_awq_leaves_alone_what_nothing_could_take_over():
    from lmms_plugin.quant_backends.methods.awq import UNFOLDED

    for name in ("o_proj", "out_proj", "wo", "fc2"):
        assert UNFOLDED.match(name)
    for name in ("q_proj", "down_proj", "gate_proj", "w2", "fc1"):
        assert not UNFOLDED.match(name)
