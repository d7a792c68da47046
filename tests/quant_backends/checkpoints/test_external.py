"""Checkpoints quantized by other tools: the libraries' own layers write them here, quant_prequantized reads them."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import encode, to_model
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.checkpoints.compressors import Gptq, Scheme, stored_format
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.probe import expect_sound
from lmms_plugin.quant_backends.checkpoints.saving import pack_words
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec

FAMILY = "qwen2_5_vl"
GROUP = 32


@pytest.fixture(scope="module")
def plain(checkpoint):
    return checkpoint(FAMILY)


@pytest.fixture(scope="module")
def processor(plain):
    return AutoProcessor.from_pretrained(plain)


@torch.no_grad()
def logits(model, processor):
    image, expression = scene(np.random.default_rng(0))
    return model(**to_model(encode(processor, image, f"Where is {expression}?"), model)).logits


def load(path, **options):
    return load_quantized(str(path), backend=get("prequantized"), plan=QuantPlan(), **options)


def dense_model(plain):
    return AutoModelForImageTextToText.from_pretrained(plain)


def linears(model, *, but=("lm_head",)):
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [(name, module) for name, module in named if not any(part in name for part in but)]


def on_grid(layer, bits, symmetric):
    """Round a layer's weight in place, with float16 scales as these formats keep them; returns codes."""
    codes = round_to_nearest(layer.weight.detach(), QuantSpec(bits, GROUP, symmetric), torch.float16)
    codes = codes._replace(scale=codes.scale.float())
    layer.weight.data = codes.dequantize(bits, torch.float32)[:, : layer.in_features].clone()
    return codes


def write(plain, folder, model, quantization, rename=lambda key: key):
    """Write a model's state as a checkpoint of `plain`'s kind with a quantization_config."""
    folder.mkdir()
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    tensors = {rename(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization)
    return folder


def edit_config(folder, quantization):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def expect_same(loaded, expected, processor, *, tolerance=5e-6):
    got = logits(loaded.model, processor)
    assert (got - expected).norm() <= tolerance * expected.norm()


def expect_accounted(loaded, *, bits, count):
    report = loaded.report
    assert len(report.quantized) == count
    assert {module.bits for module in report.quantized} == {bits}
    assert all(module.reason for module in report.skipped)
    layers = {name: m for name, m in loaded.model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(layers) == {module.name for module in report.quantized}
    for module in report.quantized:
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layers[module.name].buffers()}
        assert module.bytes_after == sum(stored.values())
        assert module.relative_error is None
    assert report.bytes_after < report.bytes_before
    assert report.bytes_before == sum(t.numel() * 4 for t in {id(p): p for p in dense_tensors(loaded)}.values())


def dense_tensors(loaded):
    twin = AutoModelForImageTextToText.from_config(loaded.model.config.__class__(**_plain_config(loaded.model.config)))
    return (*twin.parameters(), *twin.buffers())


def _plain_config(config):
    return {key: value for key, value in config.to_dict().items() if key != "quantization_config"}


# --- integers, packed: read without any library ---------------------------------------------------------------------

LEGACY = {"model.visual": "visual", "model.language_model": "model"}


def legacy(key):
    """Return the name that a checkpoint of this family has on the hub."""
    return next((key.replace(new, old, 1) for new, old in LEGACY.items() if key.startswith(new)), key)


def packers(bits, symmetric):
    """Return name -> (class of auto-round that packs, quantization_config as the tool of that format writes it)."""
    pytest.importorskip("auto_round")
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing as find

    common = {"bits": bits, "group_size": GROUP, "sym": symmetric}
    made = {
        "gptq": ("auto_round:auto_gptq", {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False}),
        "gptq_v2": ("auto_round:exllamav2", {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
        "auto-round": (
            "auto_round:auto_gptq",
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        ),
        "auto-round-asymmetric": (
            "auto_round:exllamav2",
            {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2"},
        ),
        # The list of layers to leave alone names nothing in today's module tree, which ends in NaN elsewhere.
        "awq": ("auto_awq", {"quant_method": "awq", "version": "gemm", "modules_to_not_convert": ["visual"]}),
        "auto-round-awq": ("auto_awq", {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    }
    return {name: (find(kind, bits, GROUP, symmetric), config | common) for name, (kind, config) in made.items()}


def pack(kind, layer, codes, bits):
    zeros = 1 << (bits - 1) if codes.zero_point is None else codes.zero_point.float()
    if hasattr(kind, "from_linear"):
        zeros = zeros.T.contiguous() if isinstance(zeros, torch.Tensor) else zeros
        return kind.from_linear(layer, bits, GROUP, scales=codes.scale.T.contiguous(), zeros=zeros, device="cpu")
    packed = kind(bits, GROUP, layer.in_features, layer.out_features, layer.bias is not None)
    object.__setattr__(packed, "device", "cpu")
    packed.pack(layer, codes.scale, zeros, None, device="cpu")
    return packed


@pytest.mark.parametrize(
    ("name", "bits", "symmetric", "skip"),
    [
        ("gptq", 4, True, ("lm_head",)),
        ("gptq", 2, False, ("lm_head", "visual")),
        ("gptq", 8, True, ("lm_head", "visual")),
        ("gptq", 3, True, ("lm_head", "visual")),
        ("gptq_v2", 3, False, ("lm_head",)),
        ("auto-round", 4, True, ("lm_head", "merger")),
        ("auto-round-asymmetric", 4, False, ("lm_head", "merger")),
        ("awq", 4, False, ("lm_head", "visual")),
        ("awq", 4, False, ("lm_head",)),
        ("auto-round-awq", 4, True, ("lm_head", "visual")),
    ],
    ids=lambda value: str(value),
)
def test_packed_integers_come_back_exactly(plain, processor, tmp_path, name, bits, symmetric, skip):
    kind, quantization = packers(bits, symmetric)[name]
    model = dense_model(plain)
    rounded = dense_model(plain)
    layers = linears(model, but=skip)
    for path, _ in layers:
        layer = rounded.get_submodule(path)
        model.set_submodule(path, pack(kind, layer, on_grid(layer, bits, symmetric), bits))
    loaded = load(write(plain, tmp_path / name, model, quantization, legacy))
    assert all(type(loaded.model.get_submodule(path)) is PackedLinear for path, _ in layers)
    for path, _ in layers:
        assert torch.equal(loaded.model.get_submodule(path).weight, rounded.get_submodule(path).weight), path
    expect_same(loaded, logits(rounded, processor), processor)
    expect_accounted(loaded, bits=bits, count=len(layers))
    assert {module.reason for module in loaded.report.skipped if module.name.endswith("lm_head")} == {
        "the checkpoint has it dense"
    }


def test_columns_grouped_by_activation_order(plain, processor, tmp_path):
    """desc_act: g_idx says which group a column belongs to, and groups are no runs of columns."""
    kind, quantization = packers(4, True)["gptq"]
    model, rounded = dense_model(plain), dense_model(plain)
    generator = torch.Generator().manual_seed(0)
    for path, layer in linears(model, but=("lm_head", "visual")):
        order = torch.randperm(layer.in_features, generator=generator)
        index = torch.empty_like(order)
        index[order] = torch.arange(layer.in_features) // GROUP
        sorted_layer = copy.deepcopy(layer)
        sorted_layer.weight.data = layer.weight.data[:, order].clone()
        codes = on_grid(sorted_layer, 4, True)
        natural = sorted_layer.weight.data[:, torch.argsort(order)]
        rounded.get_submodule(path).weight.data = natural.clone()
        packed = pack(kind, sorted_layer, codes, 4)
        # The format stores columns in natural order.
        nibbles = _unpack_nibbles(packed.qweight)[torch.argsort(order)]
        packed.qweight = _pack_nibbles(nibbles)
        packed.register_buffer("g_idx", index.to(torch.int32))
        model.set_submodule(path, packed)
    loaded = load(write(plain, tmp_path / "ordered", model, quantization | {"desc_act": True}, legacy))
    for path, _ in linears(rounded, but=("lm_head", "visual")):
        layer = loaded.model.get_submodule(path)
        assert torch.equal(layer.weight, rounded.get_submodule(path).weight)
        assert type(layer).__name__ == "OrderedLinear"
    expect_same(loaded, logits(rounded, processor), processor)
    expect_accounted(loaded, bits=4, count=14)


# --- groups that do not divide the width: how many there are does not say how wide they are ---------------------------


def _stored(kind, columns, group_size, *, ordered=False, rows=16, bits=4):
    """Return (config, tensors, weight) of a layer whose last group may be narrower, written by this test alone."""
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = -(-columns // group_size)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    group_of = torch.arange(columns) // group_size
    if ordered:
        group_of = group_of[torch.randperm(columns, generator=generator)]
    weight = (codes.float() - 8) * scale[:, group_of]
    if kind == "compressed-tensors":
        tensors = {"weight_packed": pack_words(codes, bits), "weight_scale": scale}
        tensors |= {"weight_g_idx": group_of.int()} if ordered else {}
        scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
        groups_of_layers = {"group_0": {"targets": ["Linear"], "weights": scheme}}
        return {"format": "pack-quantized", "config_groups": groups_of_layers}, tensors, weight
    zeros = torch.full((groups, rows), 8, dtype=torch.uint8)
    if kind == "awq":
        packed = {"qweight": _interleave(codes.T), "qzeros": _interleave(zeros)}
    else:
        # One is taken off each zero point in version 1 of the format.
        packed = {"qweight": pack_words(codes, bits).T, "qzeros": pack_words(zeros - 1, bits), "g_idx": group_of.int()}
    return {"bits": bits, "group_size": group_size}, packed | {"scales": scale.T}, weight


def _interleave(values):
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return pack_words(values.reshape(len(values), -1, 8)[:, :, order].reshape(len(values), -1).contiguous(), 4)


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "g_idx"])
@pytest.mark.parametrize("columns", [192, 576, 960, 4304, 96, 256])
@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors", "awq"])
def test_groups_are_as_wide_as_the_config_says(kind, columns, ordered):
    if kind == "awq" and ordered:
        pytest.skip("the format has no order")
    config, tensors, weight = _stored(kind, columns, 128, ordered=ordered)
    read = stored_format({"quant_method": kind} | config).read(tensors, columns)
    assert read.codes.codes.shape[2] == min(128, columns)
    dense = read.codes.dequantize(read.bits, torch.float32)[:, :columns]
    assert torch.equal(dense if read.order is None else dense[:, torch.argsort(read.order)], weight)


def test_a_checkpoint_with_narrower_last_groups_computes_with_the_right_weights(plain, processor, tmp_path):
    """Groups of 48 in widths of 64 and 96 columns: two are of 48, or of 32, by their number."""
    model, rounded = dense_model(plain), dense_model(plain)
    for path, layer in linears(model, but=("lm_head", "visual")):
        _, tensors, weight = _stored("gptq", layer.in_features, 48, rows=layer.out_features)
        weight = weight / 100
        rounded.get_submodule(path).weight.data = weight
        packed = nn.Module()
        for name, tensor in (tensors | {"scales": tensors["scales"] / 100}).items():
            packed.register_buffer(name, tensor)
        packed.bias = layer.bias
        model.set_submodule(path, packed)
    quantization = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 48}
    loaded = load(write(plain, tmp_path / "narrow", model, quantization, legacy))
    for path, layer in linears(rounded, but=("lm_head", "visual")):
        torch.testing.assert_close(loaded.model.get_submodule(path).weight, layer.weight.data)
    expect_same(loaded, logits(rounded, processor), processor)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 64}, r"192 columns in 2 groups fit 0 of the group sizes .* \(64\)"),
        ({"dynamic": {"+:.*down.*": {"group_size": 96}}}, r"fit 2 of the group sizes .* \(128, 96\)"),
        ({"extra_config": {"a": {"group_size": -1}}}, None),
        ({"group_size": "128"}, "group_size should be a whole number, got '128'"),
    ],
    ids=["none fits", "two fit", "another layer's", "no number"],
)
def test_a_group_size_is_taken_from_the_config_or_not_at_all(config, message):
    given, tensors, weight = _stored("gptq", 192, 128)
    del tensors["g_idx"]
    config = {"quant_method": "gptq"} | given | config
    if message is None:
        assert torch.equal(stored_format(config).read(tensors, 192).codes.dequantize(4, torch.float32)[:, :192], weight)
        return
    with pytest.raises(ValueError, match=message):
        stored_format(config).read(tensors, 192)


def test_schemes_of_compressed_tensors_are_told_apart_by_bits_and_groups_together():
    config, tensors, weight = _stored("compressed-tensors", 192, 128)
    scheme = config["config_groups"]["group_0"]["weights"]
    others = {"other": {"weights": scheme | {"num_bits": 8, "group_size": 96}}}
    stored = stored_format(
        {"quant_method": "compressed-tensors"} | config | {"config_groups": others | config["config_groups"]}
    )
    assert torch.equal(stored.read(tensors, 192).codes.dequantize(4, torch.float32)[:, :192], weight)
    config["config_groups"]["group_0"]["weights"] = scheme | {"group_size": None}
    with pytest.raises(ValueError, match="strategy 'group' should name a group_size of at least 1, got None"):
        stored_format({"quant_method": "compressed-tensors"} | config)


def test_a_g_idx_of_minus_one_says_that_columns_are_in_order():
    config, tensors, weight = _stored("compressed-tensors", 192, 128)
    tensors["weight_g_idx"] = torch.full((192,), -1, dtype=torch.int32)
    read = stored_format({"quant_method": "compressed-tensors"} | config).read(tensors, 192)
    assert read.order is None
    assert torch.equal(read.codes.dequantize(4, torch.float32)[:, :192], weight)


def _unpack_nibbles(words):
    return ((words.unsqueeze(1) >> (4 * torch.arange(8)).view(1, 8, 1)) & 15).reshape(-1, words.shape[1])


def _pack_nibbles(codes):
    shifted = codes.view(-1, 8, codes.shape[1]).long() << (4 * torch.arange(8)).view(1, 8, 1)
    return shifted.sum(1).to(torch.int32)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_compressed_tensors_come_back_packed_and_stay_so(plain, processor, tmp_path, bits, symmetric):
    """Written by the library itself; its list of layers to ignore has names that no module has."""
    folder, rounded = compressed(plain, tmp_path / "compressed", bits, symmetric, processor)
    loaded = load(folder)
    before = loaded.report.bytes_after
    expect_same(loaded, logits(rounded, processor), processor)
    assert sum(t.numel() * t.element_size() for t in (*loaded.model.parameters(), *loaded.model.buffers())) == before
    expect_accounted(loaded, bits=bits, count=14)


def compressed(plain, folder, bits, symmetric, processor):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model, rounded = dense_model(plain), dense_model(plain)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head", "re:.*visual.*"],
        format="pack-quantized",
        quantization_status="compressed",
    )
    apply_quantization_config(model, config)
    for path, layer in linears(rounded, but=("lm_head", "visual")):
        codes = on_grid(layer, bits, symmetric)
        twin = model.get_submodule(path)
        twin.weight.data = layer.weight.data.clone()
        twin.weight_scale.data = codes.scale.clone()
        if codes.zero_point is not None:
            offset = codes.zero_point.int() - (1 << (bits - 1))
            twin.weight_zero_point.data = offset.to(twin.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    compressor.update_config(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", "visual.blocks.0.attn.qkv"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, rounded


def test_a_scheme_that_is_not_reproduced_is_reported_as_dense(plain, processor, tmp_path):
    """A scale over all inputs at once: transformers loads it through the library, and the report says what is lost."""
    pytest.importorskip("compressed_tensors")
    folder, rounded = float8(plain, tmp_path / "float8", "tensor")
    loaded = load(folder)
    expect_same(loaded, logits(rounded, processor), processor, tolerance=1e-3)
    assert loaded.report.quantized == ()
    reasons = {module.reason for module in loaded.report.skipped if "q_proj" in module.name}
    expected = "compressed-tensors (float-quantized) runs dense: values are rounded, memory is not saved"
    assert reasons == {f"{expected} and inputs are not rounded, as it asks"}


def float8(plain, folder, inputs):
    model, rounded = dense_model(plain), dense_model(plain)
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    for path, layer in linears(rounded, but=("lm_head", "visual")):
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 448
        codes = (layer.weight.detach() / scale).to(torch.float8_e4m3fn)
        layer.weight.data = codes.float() * scale
        twin = model.get_submodule(path)
        twin.weight = nn.Parameter(codes, requires_grad=False)
        twin.register_buffer("weight_scale", scale)
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme,
                "input_activations": scheme | {"strategy": inputs, "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*visual.*"],
    }
    return write(plain, folder, model, quantization), rounded


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_layers_come_back_exactly(plain, processor, tmp_path, bits):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model, rounded = dense_model(plain), dense_model(plain)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    tensors = dict(model.state_dict())
    for path, layer in linears(model, but=("lm_head", "visual")):
        theirs = HQQLinear(copy.deepcopy(layer), config, compute_dtype=torch.float32, device="cpu")
        rounded.get_submodule(path).weight.data = theirs.dequantize()
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{key}": value for key, value in theirs.state_dict().items() if value is not None}
    folder = write(plain, tmp_path / "hqq", nn.Module(), {"quant_method": "hqq", "skip_modules": ["lm_head"]})
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder)
    for path, _ in linears(rounded, but=("lm_head", "visual")):
        assert torch.equal(loaded.model.get_submodule(path).weight, rounded.get_submodule(path).weight), path
    expect_same(loaded, logits(rounded, processor), processor)
    expect_accounted(loaded, bits=bits, count=14)


# --- formats that run on their own library ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "bits", "count"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 4, 14),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, 4, 14),
        ({"load_in_8bit": True}, 8, 14),
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_bitsandbytes(plain, processor, tmp_path, options, bits, count):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=["model.visual", "lm_head"])
    model = AutoModelForImageTextToText.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for module in model.modules():
        # With avx512_bf16 the library's layers would multiply in bfloat16, whatever their compute_dtype.
        module.support_avx512bf16_for_cpu = False
    expected = logits(model, processor)
    loaded = load(tmp_path)
    expect_same(loaded, expected, processor, tolerance=0)
    expect_accounted(loaded, bits=bits, count=count)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_written_after_a_run_with_avx512_bf16(plain, processor, tmp_path, kind):
    """There the library's layers repack themselves, and come back with transposed scales in bfloat16."""
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as repack

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, llm_int8_skip_modules=["model.visual", "lm_head"]
    )
    model = AutoModelForImageTextToText.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(tmp_path / "before")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # What Linear4bit.forward does on such a processor.
            module.weight.data, module.weight.quant_state = repack(module.weight.data, module.weight.quant_state)
    model.save_pretrained(tmp_path / "after")
    assert any(
        tensor.ndim == 2 for key, tensor in load_file(tmp_path / "after/model.safetensors").items() if "absmax" in key
    )
    for folder in ("before", "after"):
        processor.save_pretrained(tmp_path / folder)
    first = load(tmp_path / "before")
    messages = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    try:
        second = load(tmp_path / "after")
    finally:
        logger.remove(sink)
    assert any("14 layers transposed" in message for message in messages)
    for module in first.report.quantized:
        got, expected = (loaded.model.get_submodule(module.name).weight for loaded in (second, first))
        # Scales have the 8 significant bits of bfloat16: each weight is off by half a unit of the last one at most.
        assert ((got - expected).abs() <= 2**-8 * expected.abs()).all()
    expect_accounted(second, bits=4, count=14)


def test_torchao(plain, processor, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = AutoModelForImageTextToText.from_pretrained(
        plain, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    expected = logits(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    expect_same(loaded, expected, processor, tolerance=0)
    expect_accounted(loaded, bits=8, count=26)


@pytest.mark.parametrize(
    ("method", "options", "plan"),
    [
        ("rtn", {}, {"bits": 4, "group_size": 32, "vision_bits": 8}),
        ("hqq", {}, {"bits": 3, "group_size": 32}),
        ("rtn", {}, {"bits": 8, "group_size": 48, "head_bits": 8}),
    ],
    ids=["compressed-tensors, mixed", "own", "padded, with the head"],
)
def test_what_this_package_saves(plain, processor, tmp_path, method, options, plan):
    from lmms_plugin.quant_backends.checkpoints.saving import save_quantized

    plan = QuantPlan.from_arguments(**plan)
    first = load_quantized(str(plain), backend=get(method, **options), plan=plan)
    save_quantized(first.model, first.processor, first.report, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded.model, processor), logits(first.model, processor))
    assert [(m.name, m.bits, m.bytes_after) for m in loaded.report.quantized] == [
        (m.name, m.bits, m.bytes_after) for m in first.report.quantized
    ]


def test_a_quantization_config_of_the_language_model_counts(gptq, processor, tmp_path):
    """Some tools put it beside the sizes of the part that they quantized."""
    folder = tmp_path / "nested"
    shutil.copytree(gptq, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert len(load(folder).report.quantized) == 14
    with pytest.raises(ValueError, match=r"quantized already \(gptq\).*quant_prequantized"):
        load_quantized(str(folder), backend=get("rtn"), plan=QuantPlan(language=QuantSpec(4)))


# --- traps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gptq(plain, tmp_path_factory):
    """A small GPTQ checkpoint to spoil."""
    kind, quantization = packers(4, True)["gptq"]
    model = dense_model(plain)
    for path, layer in linears(model, but=("lm_head", "visual")):
        model.set_submodule(path, pack(kind, layer, on_grid(layer, 4, True), 4))
    return write(plain, tmp_path_factory.mktemp("gptq") / "good", model, quantization, legacy)


def spoiled(gptq, folder, edit):
    shutil.copytree(gptq, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Q_PROJ = "model.layers.1.self_attn.q_proj"


def _without_zeros(tensors):
    del tensors[f"{Q_PROJ}.qzeros"]


def _too_narrow(tensors):
    tensors[f"{Q_PROJ}.qweight"] = tensors[f"{Q_PROJ}.qweight"][:5].contiguous()


def _not_finite(tensors):
    tensors[f"{Q_PROJ}.scales"][0, 0] = float("inf")


def _elsewhere(tensors):
    tensors["model.layers.9.self_attn.q_proj.qweight"] = tensors[f"{Q_PROJ}.qweight"].clone()


def _dense(tensors):
    for key in [key for key in tensors if key.endswith(".qweight")]:
        del tensors[key]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without_zeros, r"layers\.1\.self_attn\.q_proj \(gptq\): its qzeros is missing"),
        (_too_narrow, r"layers\.1\.self_attn\.q_proj \(gptq\): qweight \(5, 64\).* do not fit a width 64"),
        (_not_finite, r"logits are not finite for a plain image and question"),
        (_elsewhere, r"holds a quantized model\.layers\.9\.self_attn\.q_proj, for which the model has no place"),
        (_dense, r"says gptq, but no file holds a tensor called qweight"),
    ],
    ids=["tensor missing", "shape", "not finite", "no such layer", "nothing quantized"],
)
def test_spoiled_checkpoints_are_one_clear_error(gptq, tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load(spoiled(gptq, tmp_path / "bad", edit))


def test_a_list_of_layers_that_matches_nothing_is_noticed_where_a_library_uses_it(plain, processor, tmp_path):
    """bitsandbytes makes layers for what its skip list does not name; dense weights must not end up in them."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.visual", "lm_head"])
    model = AutoModelForImageTextToText.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["quantization_config"]["llm_int8_skip_modules"] = ["some_other_name", "lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"visual\..* is dense in the checkpoint.*llm_int8_skip_modules"):
        load(tmp_path)


def test_weights_that_go_dense_at_the_first_forward_pass_are_noticed(plain, processor):
    """What compressed-tensors does when transformers is left to itself."""
    model = dense_model(plain)
    layer = model.get_submodule("model.language_model.layers.0.mlp.up_proj")

    def unpack(module, args):
        if "grown" not in dict(module.named_buffers()):
            module.register_buffer("grown", torch.zeros(1000))

    layer.register_forward_pre_hook(unpack)
    with pytest.raises(ValueError, match=r"after one forward pass: the library that runs this format makes them dense"):
        expect_sound(model, processor)
    expect_sound(model, processor)


@pytest.mark.parametrize(
    ("method", "module", "extra"),
    [("bitsandbytes", "bitsandbytes", "bitsandbytes"), ("torchao", "torchao", "torchao")],
    ids=["bitsandbytes", "torchao"],
)
def test_a_missing_runtime_gives_the_install_command(plain, tmp_path, monkeypatch, method, module, extra):
    folder = write(plain, tmp_path / method, nn.Module(), {"quant_method": method})
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ImportError, match=rf'{method}\) needs {module}.*pip install "lmms-plugin\[{extra}\]"'):
        load(folder)


def test_a_plain_checkpoint_is_refused(plain):
    with pytest.raises(ValueError, match="is not quantized: its config has no quantization_config"):
        load(plain)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "compressed-tensors"}, "names no config_groups: nothing in it is quantized"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "names no config_groups"),
        ({"quant_method": "lmms_plugin"}, "should list its quantized layers, got None"),
        ({"quant_method": "lmms_plugin", "layers": {"nowhere": {}}}, "nowhere: the description .* does not fit"),
        ({"quant_method": "something new"}, "no layer that transformers made of it is known to be quantized"),
    ],
    ids=str,
)
def test_a_config_that_says_too_little_is_refused(plain, tmp_path, quantization, message):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / "checkpoint"
    shutil.copytree(plain, folder)
    edit_config(folder, quantization)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("key", ["transform_config", "rotation_config"])
def test_rotated_weights_are_refused(gptq, tmp_path, key):
    folder = tmp_path / "rotated"
    shutil.copytree(gptq, folder)
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, config["quantization_config"] | {key: {"type": "hadamard"}})
    with pytest.raises(ValueError, match=rf"rotates inputs before its layers \({key}\)"):
        load(folder)


def test_a_plan_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="as the checkpoint has them, but the plan asks for 4 bits"):
        load_quantized("no/such", backend=get("prequantized"), plan=QuantPlan(language=QuantSpec(4)))


def test_pickled_weights_are_refused(gptq, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(gptq, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors file"):
        load(folder, use_safetensors=False)


def test_formats_are_told_apart():
    sizes = frozenset({128})
    assert stored_format({"quant_method": "gptq"}) == Gptq("gptq", 1, sizes)
    assert stored_format({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}) == Gptq("gptq", 0, sizes)
    assert stored_format({"quant_method": "awq", "version": "gemv"}) is None
    assert stored_format({"quant_method": "fp8"}) is None
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
    assert stored_format(packed | {"config_groups": {"a": {"weights": weights}}}).schemes == {Scheme(4, 64)}
    for other in (["Linear"], {"weights": None}, {"weights": weights | {"strategy": "block"}}):
        assert stored_format(packed | {"config_groups": {"a": other}}) is None
