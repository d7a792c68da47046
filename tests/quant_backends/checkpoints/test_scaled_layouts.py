"""FP8, NVFP4, MX and W8A8 on disk: as compressed-tensors and the hub have them, and back again."""

import json
import shutil

import numpy as np
import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.quant_backends.calibration.inputs import encode, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.quant_backends.checkpoints.scaled_layouts import scaled_format
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan

FAMILY = "qwen2_5_vl"
W8A8 = {"bits": 8, "group_size": -1, "symmetric": True}
STATIC = {"activation_granularity": "tensor"}

CASES = {
    "int8": ("rtn", {"activation_format": "int8"}, W8A8, "int-quantized"),
    "int8 static": ("gptq", {"activation_format": "int8"} | STATIC, W8A8, "int-quantized"),
    "fp8": ("rtn", {"format": "fp8_e4m3", "activation_format": "fp8_e4m3"}, {}, "float-quantized"),
    "fp8 static": (
        "gptq",
        {"format": "fp8_e4m3_tensor", "activation_format": "fp8_e4m3"} | STATIC,
        {},
        "float-quantized",
    ),
    "fp8 squares": (
        "rtn",
        {"format": "fp8_e4m3_block", "activation_format": "fp8_e4m3", "activation_granularity": "block"},
        {},
        "float-quantized",
    ),
    "fp8 weights": ("rtn", {"format": "fp8_e4m3"}, {}, "naive-quantized"),
    "nvfp4 weights": ("rtn", {"format": "nvfp4"}, {}, "nvfp4-pack-quantized"),
    "nvfp4": ("gptq", {"format": "nvfp4", "activation_format": "nvfp4"}, {}, "nvfp4-pack-quantized"),
    "mxfp4": ("rtn", {"format": "mxfp4", "activation_format": "mxfp4"}, {}, "mxfp4-pack-quantized"),
    "mxfp6": ("rtn", {"format": "mxfp6_e2m3", "activation_format": "mxfp8"}, {}, "mxfp6-pack-quantized"),
    "mxfp8": ("rtn", {"format": "mxfp8", "activation_format": "mxfp8"}, {}, "mxfp8-quantized"),
}
FOLDED = {
    "int8": ({"activation_format": "int8"}, W8A8, "int-quantized"),
    "fp8": ({"format": "fp8_e4m3", "activation_format": "fp8_e4m3"} | STATIC, {}, "float-quantized"),
    "nvfp4": ({"format": "nvfp4", "activation_format": "nvfp4"}, {}, "nvfp4-pack-quantized"),
    "mxfp4": ({"format": "mxfp4"}, {}, "mxfp4-pack-quantized"),
}


def load(path, backend, *, dtype=torch.float32, **plan):
    given = {"bits": backend.default_bits} | plan if backend.name != "prequantized" else None
    calibrated = CalibrationSpec("noise", samples=1) if isinstance(backend, CalibratedBackend) else None
    made = QuantPlan() if given is None else QuantPlan.from_arguments(**given)
    return load_quantized(str(path), backend=backend, plan=made, dtype=dtype, calibration=calibrated)


@torch.no_grad()
def logits(model, processor):
    image, expression = scene(np.random.default_rng(0))
    return model(**to_model(encode(processor, image, f"Where is {expression}?"), model)).logits


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def decompressed(folder):
    """Weights of a checkpoint as compressed-tensors' own compressor of its format makes them: stored name -> weight."""
    registry = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
    schemes = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    compressor = registry.get_value_from_registry(config["format"])
    scheme = schemes(**config["config_groups"]["group_0"])
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in {key.rpartition(".")[0] for key in tensors if key.endswith(".weight_scale")}:
        state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        found[name] = compressor.decompress({key: state[key] for key in state if key.startswith("weight")}, scheme)[
            "weight"
        ]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_layouts_are_those_of_compressed_tensors_and_come_back_bit_for_bit(checkpoint, tmp_path, case, dtype):
    method, options, plan, layout = CASES[case]
    first = load(checkpoint(FAMILY), get(method, **options), dtype=dtype, **plan)
    saved = save_quantized(first.model, first.processor, first.report, tmp_path / "saved", form="compressed-tensors")
    assert saved.layout == layout
    layers = quantized_layers(first.model)
    theirs = decompressed(tmp_path / "saved")
    assert theirs.keys() == layers.keys()
    for name, layer in layers.items():
        # It decodes 4-bit floats in bfloat16, whatever the model is.
        rounded = layer.weight.to(theirs[name].dtype)
        assert torch.equal(theirs[name].to(dtype), rounded.to(dtype)), name
    second = load(tmp_path / "saved", get("prequantized"), dtype=dtype)
    assert torch.equal(logits(second.model, second.processor), logits(first.model, first.processor))
    assert [layer.kernel for layer in quantized_layers(second.model).values()] == [
        layer.kernel for layer in layers.values()
    ]
    assert second.report.bytes_after == first.report.bytes_after


@pytest.mark.parametrize("case", FOLDED)
def test_folded_scales_and_rounded_inputs_of_awq_are_written_without_a_changed_bit(checkpoint, tmp_path, case):
    options, plan, layout = FOLDED[case]
    first = load(checkpoint(FAMILY), get("awq", fold=True, **options), **plan)
    assert any(layer.in_scale is not None for layer in quantized_layers(first.model).values())
    before = logits(first.model, first.processor)
    saved = save_quantized(first.model, first.processor, first.report, tmp_path / "saved", form="compressed-tensors")
    assert saved.layout == layout
    second = load(tmp_path / "saved", get("prequantized"))
    assert torch.equal(logits(second.model, second.processor), before)
    found = quantized_layers(second.model).values()
    assert {layer.rounding.name if layer.rounding else None for layer in found} == {options.get("activation_format")}


@pytest.mark.parametrize("case", ["int8", "fp8", "nvfp4 weights"])
def test_transformers_reads_the_weights_without_this_package(checkpoint, tmp_path, case):
    pytest.importorskip("compressed_tensors")
    method, options, plan, _ = CASES[case]
    loaded = load(checkpoint(FAMILY), get(method, **options), **plan)
    save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved", form="compressed-tensors")
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    for name, layer in quantized_layers(loaded.model).items():
        assert type(plain.get_submodule(name)) is nn.Linear
        torch.testing.assert_close(plain.get_submodule(name).weight, layer.weight, rtol=2**-8, atol=0)


# --- what others publish --------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """Linear layer of plain float32 arithmetic: a dense weight, and inputs rounded by a function."""

    def __init__(self, weight, bias, round_inputs):
        super().__init__()
        self.weight, self.bias, self.round_inputs = nn.Parameter(weight), bias, round_inputs

    def forward(self, x):
        return nn.functional.linear(self.round_inputs(x), self.weight, self.bias)


def by_token(x):
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def by_blocks_of_128(x):
    return torch.cat([by_token(part) for part in x.split(128, -1)], -1)


def fp8(weight, height, width):
    """One tensor of E4M3 and the scales of its blocks, block by block."""
    rows, columns = weight.shape
    scales, stored = torch.ones(-(-rows // height), -(-columns // width)), torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = weight[block].abs().max() / 448
            stored[block] = weight[block] / scales[i, j]
    stored = stored.to(torch.float8_e4m3fn)
    spread = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return stored, scales, stored.float() * spread


def published(plain, folder, quantization, convert, round_inputs):
    """Write a checkpoint as a tool does, its decoder quantized, and return the plain model that it stands for."""
    model = AutoModelForImageTextToText.from_pretrained(plain)
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    named = {key.removesuffix(".weight").replace("model.", "model.language_model.", 1): key for key in tensors}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "language_model" in name:
            key = named.get(name, f"{name}.weight")
            stored, dense = convert(name, tensors.pop(key))
            tensors |= {f"{key.removesuffix('.weight')}.{part}": value for part, value in stored.items()}
            rounding = round_inputs if callable(round_inputs) else round_inputs["self_attn" in name]
            model.set_submodule(name, Reference(dense, module.bias, rounding))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return model


def expect_published(plain, folder, quantization, convert, round_inputs):
    reference = published(plain, folder, quantization, convert, round_inputs)
    loaded = load(folder, get("prequantized"))
    expected, found = (logits(model, loaded.processor) for model in (reference, loaded.model))
    # Rounded inputs turn the last bit of a sum into a step of the format here and there.
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    layers = quantized_layers(loaded.model)
    assert len(layers) == sum(isinstance(module, Reference) for module in reference.modules())
    return loaded


def test_fp8_with_blocks_of_128_by_128(checkpoint, tmp_path):
    """As Qwen and DeepSeek publish it: weight_scale_inv is what the weight is multiplied with."""

    def convert(name, weight):
        stored, scales, dense = fp8(weight, 128, 128)
        return {"weight": stored, "weight_scale_inv": scales}, dense

    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["visual", "lm_head"],
    }
    loaded = expect_published(checkpoint(FAMILY), tmp_path / "fp8", quantization, convert, by_blocks_of_128)
    assert {module.kernel for module in loaded.report.quantized} == {
        "fp8_e4m3_block, dequantize, fp8_e4m3 inputs per block"
    }


def test_fp8_per_tensor_with_static_inputs(checkpoint, tmp_path):
    def convert(name, weight):
        stored, scales, dense = fp8(weight, *weight.shape)
        return {"weight": stored, "weight_scale": scales.view(()), "input_scale": torch.tensor(0.01)}, dense

    quantization = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    expect_published(
        checkpoint(FAMILY),
        tmp_path / "fp8",
        quantization,
        convert,
        lambda x: (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01,
    )


def arguments(**given):
    """Arguments of a config group with everything that llm-compressor writes."""
    filled = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": None}
    rest = {"block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {}}
    return filled | rest | given


def compressed(layout, weights, inputs, **others):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    named = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    return named | {"config_groups": {"group_0": group}, "ignore": ["re:.*visual.*", "lm_head"], **others}


def test_compressed_tensors_fp8_dynamic_with_scales_in_bfloat16(checkpoint, tmp_path):
    """As RedHatAI publishes it; the config's key-value scheme is noticed."""

    def convert(name, weight):
        scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
        stored = (weight / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scales}, stored.float() * scales.float()

    said = []
    handler = logger.add(said.append, level="WARNING", format="{message}")
    try:
        cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        loaded = expect_published(
            checkpoint(FAMILY),
            tmp_path / "fp8",
            compressed(
                "float-quantized",
                arguments(strategy="channel"),
                arguments(strategy="token", dynamic=True, observer=None),
                kv_cache_scheme=cache,
            ),
            convert,
            by_token,
        )
    finally:
        logger.remove(handler)
    assert any("key-value cache" in line for line in said)
    assert {module.method for module in loaded.report.quantized} == {"compressed-tensors, KV scheme not taken"}


def test_compressed_tensors_w8a8_of_integers(checkpoint, tmp_path):
    def convert(name, weight):
        scales = weight.abs().amax(1, keepdim=True) / 127.5
        stored = (weight / scales).round().clamp(-128, 127).to(torch.int8)
        return {"weight": stored, "weight_scale": scales}, stored.float() * scales

    def by_token_to_127(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    weights, inputs = arguments(type="int", strategy="channel"), arguments(type="int", strategy="token", dynamic=True)
    expect_published(
        checkpoint(FAMILY), tmp_path / "int8", compressed("int-quantized", weights, inputs), convert, by_token_to_127
    )


def four_bits(x):
    """The nearest of E2M1's values, ties to the even mantissa, by going through all of them."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    distance = (x.abs().clamp(max=6).unsqueeze(-1) - values).abs()
    odd = torch.arange(8) % 2 * 1e-7
    codes = (distance + odd).argmin(-1)
    return codes + 8 * x.signbit(), values[codes] * torch.where(x.signbit(), -1.0, 1.0)


def nvfp4(x, total):
    blocks = x.unflatten(-1, (-1, 16))
    local = (blocks.abs().amax(-1, keepdim=True) / 6 * total).clamp(max=448).to(torch.float8_e4m3fn)
    local = torch.where(local.float() == 0, 0.125, local.float())
    codes, values = four_bits(blocks / (local / total))
    return codes.flatten(-2), local.squeeze(-1), (values * (local / total)).flatten(-2)


def test_nvfp4_weights_and_inputs(checkpoint, tmp_path):
    inputs_total = torch.tensor(2688 / 8.0)

    def convert(name, weight):
        total = 448 * 6 / weight.abs().max()
        codes, local, dense = nvfp4(weight, total)
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
        stored = {"weight_packed": packed, "weight_scale": local.to(torch.float8_e4m3fn)}
        return stored | {
            "weight_global_scale": total.view(1),
            "input_global_scale": inputs_total.view(1).clone(),
        }, dense

    weights = arguments(num_bits=4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    inputs = arguments(num_bits=4, strategy="tensor_group", group_size=16, dynamic="local")
    expect_published(
        checkpoint(FAMILY),
        tmp_path / "nvfp4",
        compressed("nvfp4-pack-quantized", weights, inputs),
        convert,
        lambda x: nvfp4(x, inputs_total)[2],
    )


@pytest.mark.parametrize(
    "inputs",
    [
        arguments(type="int", strategy="token", dynamic=True, symmetric=False),
        arguments(type="int", strategy="tensor", dynamic=True),
        arguments(type="float", strategy="token", dynamic=True, num_bits=4),
    ],
    ids=["asymmetric", "dynamic over the tensor", "4-bit tokens"],
)
def test_schemes_that_are_not_reproduced_are_left_to_the_dense_way_which_says_so(inputs):
    assert scaled_format(compressed("int-quantized", arguments(type="int", strategy="channel"), inputs)) is None


def blocks_of(width, x):
    return torch.cat([by_token(part) for part in x.split(width, -1)], -1)


@pytest.mark.parametrize("tool", ["fp8", "compressed-tensors"])
def test_fp8_with_blocks_that_do_not_divide_the_weight(checkpoint, tmp_path, tool):
    """The last blocks are narrower; saved in our own format, blocks of this shape come back."""
    scales_are = {"fp8": "weight_scale_inv", "compressed-tensors": "weight_scale"}[tool]
    shapes = set()

    def convert(name, weight):
        stored, scales, dense = fp8(weight, 24, 20)
        shapes.add(tuple(weight.shape))
        return {"weight": stored, scales_are: scales}, dense

    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 20]}
    if tool == "compressed-tensors":
        weights = arguments(strategy="block", block_structure=[24, 20])
        quantization = compressed("float-quantized", weights, arguments(strategy="group", group_size=20, dynamic=True))
    loaded = expect_published(checkpoint(FAMILY), tmp_path / "fp8", quantization, convert, lambda x: blocks_of(20, x))
    assert all(rows % 24 and columns % 20 for rows, columns in shapes)
    kernels = {"fp8_e4m3_block of 24 x 20, dequantize, fp8_e4m3 inputs per block of 20"}
    assert {module.kernel for module in loaded.report.quantized} == kernels
    save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "own", form="own")
    again = load(tmp_path / "own", get("prequantized"))
    assert torch.equal(logits(again.model, again.processor), logits(loaded.model, loaded.processor))
    assert {module.kernel for module in again.report.quantized} == kernels


def test_scales_of_other_blocks_than_the_config_names_are_refused(checkpoint, tmp_path):
    def convert(name, weight):
        stored, scales, dense = fp8(weight, 8, 16)
        return {"weight": stored, "weight_scale_inv": scales.T.contiguous()}, dense

    quantization = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    published(checkpoint(FAMILY), tmp_path / "fp8", quantization, convert, by_token)
    with pytest.raises(ValueError, match=r"language_model.*scales .*, expected .* of fp8_e4m3_block of 8 x 16"):
        load(tmp_path / "fp8", get("prequantized"))


@pytest.mark.parametrize("block", [[128], [0, 128], "wide", 128])
def test_a_block_that_is_none_is_refused(block):
    with pytest.raises(ValueError, match="weight_block_size should be two positive whole numbers"):
        scaled_format({"quant_method": "fp8", "weight_block_size": block})


# --- several schemes ------------------------------------------------------------------------------------------------

FP8_TOKENS = (arguments(strategy="channel"), arguments(strategy="token", dynamic=True))
NVFP4 = arguments(num_bits=4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
ATTENTION = "re:.*self_attn.(q|k|v|o)_proj$"


def group(targets, layout, weights, inputs=None):
    said = {"targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None}
    return said | ({} if layout is None else {"format": layout})


def mixed(*groups):
    named = {"quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed"}
    return named | {"config_groups": {f"group_{k}": one for k, one in enumerate(groups)}, "ignore": ["lm_head"]}


def fp8_attention_nvfp4_mlp(name, weight):
    if "self_attn" in name:
        stored, scales, dense = fp8(weight, 1, weight.shape[1])
        return {"weight": stored, "weight_scale": scales}, dense
    total = 448 * 6 / weight.abs().max()
    codes, local, dense = nvfp4(weight, total)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    stored = {"weight_packed": packed, "weight_scale": local.to(torch.float8_e4m3fn)}
    return stored | {"weight_global_scale": total.view(1)}, dense


@pytest.mark.parametrize("named", [True, False], ids=["formats named", "formats inferred"])
def test_schemes_are_read_layer_by_layer_names_before_classes(checkpoint, tmp_path, named):
    quantization = mixed(
        group(["Linear"], "nvfp4-pack-quantized" if named else None, NVFP4),
        group([ATTENTION], "float-quantized" if named else None, *FP8_TOKENS),
    )
    rounded = {True: by_token, False: lambda x: x}
    loaded = expect_published(checkpoint(FAMILY), tmp_path / "mixed", quantization, fp8_attention_nvfp4_mlp, rounded)
    kernels = {("self_attn" in module.name, module.kernel) for module in loaded.report.quantized}
    assert kernels == {
        (True, "fp8_e4m3, dequantize, fp8_e4m3 inputs per token"),
        (False, "nvfp4, dequantize"),
    }
    assert {module.method for module in loaded.report.quantized} == {"compressed-tensors, 2 schemes"}


ASYMMETRIC = arguments(type="int", strategy="token", dynamic=True, symmetric=False)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            [group([ATTENTION], "float-quantized", FP8_TOKENS[0], ASYMMETRIC), group(["Linear"], None, NVFP4)],
            r"layers\.0\.self_attn\..* is stored as .*inputs asymmetric dynamic int8 per token \(group_0\), a scheme",
        ),
        (
            [group([ATTENTION], None, *FP8_TOKENS), group(["re:.*gate_proj"], None, NVFP4)],
            r"layers\.0\.mlp\..* is stored quantized, but no config group targets it \(targets are re:",
        ),
        (
            [group([ATTENTION], None, NVFP4), group(["Linear"], None, *FP8_TOKENS)],
            r"should be stored as compressed-tensors \(nvfp4-pack-quantized\), with weight_packed, but it holds",
        ),
        (
            [group(["re:(("], None, *FP8_TOKENS), group(["Linear"], None, NVFP4)],
            r"targets 're:\(\(', which is no usable regular expression",
        ),
        (
            [group(["re:.*self_attn$"], None, None, FP8_TOKENS[1]), group(["Linear"], None, NVFP4)],
            r"its group_0 \(targets re:\.\*self_attn\$\) has no weights",
        ),
    ],
    ids=["not reproduced", "no target", "other tensors", "no expression", "no weights"],
)
def test_a_scheme_that_cannot_be_read_names_its_layer(checkpoint, tmp_path, groups, said):
    published(checkpoint(FAMILY), tmp_path / "mixed", mixed(*groups), fp8_attention_nvfp4_mlp, by_token)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "mixed", get("prequantized"))


PLAN = """
components: {language: {format: nvfp4}, vision: {format: int4, group_size: 16}}
roles:
  attention: {format: fp8_e4m3, activation_format: fp8_e4m3}
"""


@torch.no_grad()
def test_a_plan_with_formats_writes_one_config_group_per_scheme(checkpoint, tmp_path):
    """The loader of compressed-tensors itself, applied to the plain model, finds our weights."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    (tmp_path / "plan.yaml").write_text(PLAN)
    first = load(checkpoint(FAMILY), get("rtn"), plan=tmp_path / "plan.yaml")
    saved = save_quantized(first.model, first.processor, first.report, tmp_path / "saved", form="compressed-tensors")
    assert (saved.layout, saved.schemes) == ("mixed-precision", 3)
    second = load(tmp_path / "saved", get("prequantized"))
    assert torch.equal(logits(second.model, second.processor), logits(first.model, first.processor))
    layers = quantized_layers(first.model)
    assert [layer.kernel for layer in quantized_layers(second.model).values()] == [
        layer.kernel for layer in layers.values()
    ]

    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert {one["format"] for one in written["config_groups"].values()} == {
        "float-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    }
    known = quantization.QuantizationConfig.model_fields
    config = quantization.QuantizationConfig(**{key: written[key] for key in written.keys() & known})
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint(FAMILY))
    quantization.apply_quantization_config(plain, config)
    theirs = compressors.ModelCompressor(quantization_config=config)
    theirs.compress_model(plain)
    plain.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    theirs.decompress_model(plain)
    for name, layer in layers.items():
        dense = plain.get_submodule(name).weight
        assert torch.equal(dense, layer.weight.to(dense.dtype)), name


def test_a_missing_static_scale_is_told(checkpoint, tmp_path):
    def convert(name, weight):
        stored, scales, dense = fp8(weight, *weight.shape)
        return {"weight": stored, "weight_scale": scales.view(())}, dense

    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    published(checkpoint(FAMILY), tmp_path / "fp8", quantization, convert, by_token)
    with pytest.raises(ValueError, match=r"language_model.*\(fp8\).*its input_scale is missing"):
        load(tmp_path / "fp8", get("prequantized"))
