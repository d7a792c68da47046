"""Rotations: orthogonal, with the dense model's outputs, refused where they would not have them, and worth it."""

import copy
import json

import pytest
import torch
from helpers.families import BUILDERS, build
from helpers.small_families import Tiny
from PIL import Image
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import answered, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.forms import expect_storable
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import COMPRESSED_TENSORS_VERSION, save_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.plans.rotation_spec import RotationSpec
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.rotations.hadamard import (
    MeanKeepingRotation,
    Rotation,
    input_rotation,
    rotate_inputs,
    walsh_hadamard,
)
from lmms_plugin.quant_backends.rotations.rotate import rotate
from lmms_plugin.quant_backends.rotations.sites import ENTRANCES, find_sites
from lmms_plugin.quant_backends.rotations.towers import find_tower
from lmms_plugin.quantize import Asked, inspect

SIZES = (1, 2, 3, 64, 80, 96, 576, 960, 37 * 4)
SPEC = RotationSpec(seed=0, online=False)
ROTATED = tuple(family for family in BUILDERS if family in ENTRANCES)
"""Families of tiny checkpoints with a processor; others are built below the level of processors."""
HAND_MADE = tuple(sorted(set(ENTRANCES) - set(ROTATED)))


@pytest.mark.parametrize("size", SIZES)
def test_rotations_that_keep_the_mean_are_orthogonal_and_commute_with_layer_norms(size):
    turn, x = MeanKeepingRotation(size, 3), torch.randn(5, size, dtype=torch.float64) + 2
    matrix = turn(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(turn(torch.ones(size, dtype=torch.float64)), torch.ones(size, dtype=torch.float64))
    norm = nn.LayerNorm(size, elementwise_affine=False, dtype=torch.float64)
    assert torch.allclose(norm(turn(x)), turn(norm(x)), atol=1e-8)
    # No channel keeps more than a few of its shares of 1 / √size.
    assert size < 64 or float(matrix.abs().max()) < 5 / size**0.5


def test_a_large_channel_is_spread_over_all_by_a_rotation_that_keeps_the_mean():
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 7] *= 60
    assert float(MeanKeepingRotation(192, 0)(x).abs().max()) < float(x.abs().max()) / 3


@pytest.mark.parametrize("size", SIZES)
def test_rotations_of_all_sizes_are_orthogonal(size):
    matrix = Rotation(size, 3)(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_a_power_of_two_is_a_hadamard_matrix_with_random_signs():
    matrix = Rotation(64, 0)(torch.eye(64, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))
    assert 16 < int((matrix[:, 0] < 0).sum()) < 48


def test_a_seed_gives_one_rotation():
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(Rotation(96, 5)(x), Rotation(96, 5)(x))
    assert not torch.allclose(Rotation(96, 5)(x), Rotation(96, 6)(x))


def test_rotated_inputs_leave_the_product_as_it_is():
    layer = nn.Linear(96, 8)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    layer.weight.data = Rotation(96, 2)(layer.weight.data)
    rotate_inputs(layer, Rotation(96, 2))
    assert torch.allclose(layer(x), before, atol=1e-5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of a tiny checkpoint, by family."""
    built = {}

    def folder(family):
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp(family))
        return built[family]

    return folder


def dense(folder, **options):
    return load_quantized(str(folder), backend=get("none"), plan=QuantPlan(), dtype=torch.float32, **options)


def quantized(folder, method="rtn", *, bits=4, calibration=None, others=8, **options):
    plan = QuantPlan.from_arguments(bits=bits, group_size=32, connector_bits=others, head_bits=others)
    backend = get(method, **options)
    return load_quantized(str(folder), backend=backend, plan=plan, dtype=torch.float32, calibration=calibration)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(loaded):
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    given = answered(loaded.model, loaded.processor, image, "Where?", "Here.")
    return loaded.model(**to_model(given, loaded.model)).logits


def grow_gains(model):
    """Give norms weights that are not all alike, so that a norm that is not absorbed shows."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or (name.endswith("_proj.bias") and parameter.dim() == 1):
            parameter.data += torch.rand(parameter.shape, generator=draw) - 0.5


@pytest.mark.model
@torch.no_grad()
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("family", ROTATED)
def test_a_rotated_model_has_the_logits_of_the_original(checkpoints, family, online):
    loaded = dense(checkpoints(family))
    grow_gains(loaded.model)
    before = logits(loaded)
    sites = find_sites(loaded.model)
    embedding = loaded.model.get_input_embeddings().weight.clone()
    rotate(loaded.model, SPEC, [block.down for block in sites.blocks] if online else ())
    assert not torch.allclose(loaded.model.get_input_embeddings().weight, embedding, atol=1e-2)
    gain = loaded.model.get_submodule(sites.last_norm).weight
    assert torch.equal(gain, torch.full_like(gain, sites.neutral))
    assert float((logits(loaded) - before).abs().max() / before.abs().max()) < 1e-4


TOWERS = ("idefics3", "smolvlm", "paligemma", "llava_onevision")


@pytest.mark.model
@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_a_rotated_tower_shows_the_decoder_the_same(checkpoints, family):
    loaded = dense(checkpoints(family))
    grow_gains(loaded.model)
    sites = find_tower(loaded.model)
    draw = torch.Generator().manual_seed(5)
    for name, parameter in loaded.model.named_parameters():
        if "norm" in name and name.startswith(sites.blocks[0].partition(".encoder")[0]):
            # Gains that differ, and biases that are not zero.
            parameter.data += torch.rand(parameter.shape, generator=draw) - 0.5 * name.endswith("bias")
    before, weight = logits(loaded), loaded.model.get_submodule(f"{sites.blocks[0]}.mlp.fc1").weight.clone()
    rotate(loaded.model, RotationSpec(seed=0, online=False, vision=True))
    assert not torch.allclose(loaded.model.get_submodule(f"{sites.blocks[0]}.mlp.fc1").weight, weight, atol=1e-2)
    gain = loaded.model.get_submodule(f"{sites.blocks[0]}.layer_norm1").weight
    assert torch.equal(gain, torch.ones_like(gain))
    assert float((logits(loaded) - before).abs().max() / before.abs().max()) < 1e-4


@pytest.mark.model
@torch.no_grad()
def test_a_rotated_tower_helps_where_a_channel_of_its_stream_is_large(checkpoints):
    original = dense(checkpoints("smolvlm"))
    tower = find_tower(original.model)
    original.model.get_submodule(tower.patches).weight.data[5] *= 100
    expected = logits(original)
    plan = QuantPlan.from_arguments(bits=16, vision_bits=4, group_size=32)
    errors = []
    for vision in (False, True):
        model = copy.deepcopy(original.model)
        quantize(model, get("rtn", activation_format="int4", rotation="hadamard", rotate_vision=vision), plan)
        errors.append(distance(logits(original._replace(model=model)), expected))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.model
@pytest.mark.parametrize(
    ("family", "reason"),
    [("qwen2_5_vl", "where the features of a qwen2_5_vl tower are read"), ("llava", "pre_layrnorm|embeddings hold")],
)
def test_other_towers_are_refused_with_the_reason(checkpoints, family, reason):
    with pytest.raises(ValueError, match=rf"rotate_vision: the vision tower of .* cannot be rotated, .*({reason})"):
        quantized(checkpoints(family), rotation="hadamard", rotate_vision=True, others=16)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_random_signs_suppress_the_outlier_that_a_plain_hadamard_matrix_makes_of_a_mean(mean):
    """MQuant's rotation magnitude suppression: rows with a mean μ get a first column of √columns · μ."""
    size = 256
    weight = torch.randn(64, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean
    plain = walsh_hadamard(weight.unsqueeze(-1)).squeeze(-1) / size**0.5
    assert plain[:, 0].abs().mean() == pytest.approx(size**0.5 * mean if mean else 0.8, rel=0.2)
    signed = Rotation(size, 0)(weight)
    # With random signs columns have means of the size of μ, whatever the width.
    assert float(signed.mean(0).abs().max()) < 4 * max(mean, 0.15)


@pytest.mark.model
@torch.no_grad()
@pytest.mark.parametrize("family", HAND_MADE)
def test_families_without_a_processor_here_keep_their_logits(family):
    tiny = Tiny(family)
    grow_gains(tiny.model)
    inputs = tiny.batch([tiny.row(5)], [0])
    before = tiny.model(**inputs).logits
    rotate(tiny.model, SPEC)
    assert float((tiny.model(**inputs).logits - before).abs().max() / before.abs().max()) < 1e-4


REFUSED = {
    "gemma3": "_feedforward_layernorm",
    "blip2_opt": "is a LayerNorm",
    "blip2_t5": "no decoder with one output projection",
    "qwen3_vl_moe": "mlp.experts",
}


@pytest.mark.model
@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_with_the_reason(checkpoints, family, monkeypatch):
    folder = checkpoints(family)
    for file in folder.glob("*.safetensors"):
        # Nothing of it is read before the refusal.
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"rotation: .* cannot be rotated") as refused:
        quantized(folder, rotation="hadamard", others=16)
    assert REFUSED[family] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rotation": "givens"}, "rotation must be one of hadamard"),
        ({"rotation": "hadamard", "rotation_seed": -1}, "rotation_seed must be 0 or more"),
        ({"rotation_seed": 3}, "needs a rotation"),
        ({"rotate_vision": True}, "rotate_vision=True needs a rotation"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        get("rtn", **options)


@torch.no_grad()
@pytest.mark.parametrize("matter", [40, 1])
def test_a_rotated_layer_with_planted_outlier_channels_has_less_error_in_four_bits(matter):
    draw = torch.Generator().manual_seed(0)
    x, layer = torch.randn(64, 192, generator=draw), nn.Linear(192, 96, bias=False)
    layer.weight.data = torch.randn(96, 192, generator=draw)
    x[:, [5, 100]] *= 40
    layer.weight.data[:, [5, 100]] *= matter / 40
    expected = x @ layer.weight.T
    backend, rotation = get("rtn", activation_format="int4"), Rotation(192, 1)
    plain, rotated = (
        backend.quantize_linear(weight, None, QuantSpec(4, 32)) for weight in (layer.weight, rotation(layer.weight))
    )
    rotate_inputs(rotated, rotation)
    assert distance(rotated(x), expected) < distance(plain(x), expected) / 1.5


def plant_outliers(model, times=30):
    """Let two channels of the residual stream be so many times as large as the others, and matter no more than they."""
    sites = find_sites(model)
    channels = [3, 40]
    model.get_submodule(sites.embedding).weight.data[:, channels] *= times
    for name in sites.entrances:
        model.get_submodule(name).weight.data[channels] *= times
    readers = [name for block in sites.blocks for name in (*sum(block.norms.values(), ()), block.values)]
    for name in (sites.head, *readers):
        model.get_submodule(name).weight.data[:, channels] /= times
    for name in (sites.last_norm, *(name for block in sites.blocks for name in block.norms)):
        # The outliers fill the root mean square by which the norm divides.
        model.get_submodule(name).weight.data *= times * (len(channels) / sites.hidden) ** 0.5


@pytest.mark.model
def test_rotation_helps_a_model_with_outlier_channels_in_w4a4(checkpoints, tmp_path):
    original = dense(checkpoints("qwen2_5_vl"))
    plant_outliers(original.model)
    original.model.save_pretrained(tmp_path)
    original.processor.save_pretrained(tmp_path)
    expected = logits(original)
    plain = distance(logits(quantized(tmp_path, activation_format="int4")), expected)
    rotated = distance(logits(quantized(tmp_path, activation_format="int4", rotation="hadamard")), expected)
    assert rotated < 0.8 * plain


@pytest.mark.model
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "mbq"])
def test_eight_bits_of_every_method_answer_as_the_original_does(checkpoints, method):
    calibration = None if method == "rtn" else CalibrationSpec("noise", samples=4)
    options = {"bits": 8, "activation_format": "int8", "rotation": "hadamard", "calibration": calibration}
    found = quantized(checkpoints("smolvlm"), method, **options)
    downs = [
        layer for name, layer in found.model.named_modules() if "text_model" in name and name.endswith("down_proj")
    ]
    assert downs
    assert all(input_rotation(layer) == Rotation(128, 0) for layer in downs)
    assert sum(module.kernel.endswith("rotated inputs") for module in found.report.quantized) == len(downs)
    assert distance(logits(found), logits(dense(checkpoints("smolvlm")))) < 0.1


@pytest.mark.model
@pytest.mark.parametrize(("inputs", "form"), [(None, "compressed-tensors"), ("int4", "lmms_plugin")])
def test_saved_rotated_checkpoints_answer_as_before(checkpoints, tmp_path, inputs, form):
    found = quantized(checkpoints("paligemma"), activation_format=inputs, rotation="hadamard")
    saved = save_quantized(found.model, found.processor, found.report, tmp_path / "saved")
    assert saved.format == form
    again = load_quantized(str(tmp_path / "saved"), backend=get("prequantized"), plan=QuantPlan(), dtype=torch.float32)
    assert torch.allclose(logits(again), logits(found), atol=1e-4)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["quantization_config"]["version"] == (COMPRESSED_TENSORS_VERSION if inputs is None else 2)
    assert not written["text_config"].get("tie_word_embeddings")


def test_compressed_tensors_is_refused_where_inputs_are_rotated_at_run_time():
    expect_storable(get("rtn", rotation="hadamard"), "compressed-tensors")
    with pytest.raises(ValueError, match="inputs of down projections are rotated at run time"):
        expect_storable(get("rtn", rotation="hadamard", activation_format="int8"), "compressed-tensors")


@pytest.mark.model
@pytest.mark.slow
def test_held_out_errors_compare_with_the_rotated_original():
    asked = Asked.parse("pretrained=demo,method=rtn,bits=8,activation_format=int8,rotation=hadamard")
    errors = [module.held_out_error for module in inspect(asked, held_out=1).quantized]
    assert errors
    assert all(error is not None and error < 0.1 for error in errors)
