"""From a checkpoint on disk to a quantized model: every family, every method, every weight accounted for."""

import copy
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, Llama4Config

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.backend import CodesBackend
from lmms_plugin.quant_backends.calibration.inputs import encode, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec, Rule
from lmms_plugin.quant_backends.plans.quant_report import QuantReport
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.structure.components import components

WHOLE = QuantPlan.from_arguments(bits=4, group_size=32, vision_bits=8)
CONNECTORS = {
    "qwen2_vl": 2,
    "qwen2_5_vl": 2,
    "qwen3_vl": 6,
    "idefics3": 1,
    "smolvlm": 1,
    "llava": 2,
    "llava_onevision": 2,
    "internvl": 2,
    "paligemma": 1,
    "gemma3": 0,
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def load(path, method="rtn", plan=WHOLE, **options):
    return load_quantized(str(path), backend=get(method), plan=plan, **options)


@pytest.mark.parametrize("named", ["everywhere", "by the tokenizer alone"])
def test_plain_generate_ends_and_so_does_that_of_a_saved_checkpoint(tmp_path, named):
    """A checkpoint may name its end token in its tokenizer alone; generate then wrote on to the last token allowed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    if named != "everywhere":
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["text_config"]):
            part.pop("eos_token_id", None)
        (folder / "config.json").write_text(json.dumps(config))
    plan = QuantPlan.from_arguments(bits=8)
    loaded = load(folder, plan=plan)
    save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    again = load(tmp_path / "saved", "prequantized", QuantPlan())
    image, expression = scene(np.random.default_rng(0))
    batch = encode(loaded.processor, image, DIALECTS["demo"].ask(expression))
    end = loaded.processor.tokenizer.eos_token_id
    for model in (loaded.model, again.model):
        written = model.generate(**batch, max_new_tokens=100, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert int(written[-1]) == end
        assert 5 < len(written) < 60
    stored = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [end]


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def logits(model, processor):
    image, expression = scene(np.random.default_rng(0))
    batch = to_model(encode(processor, image, f"Where is {expression}?"), model)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_components_of_every_family(checkpoint, family):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    parts = components(model)
    assert set(parts) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    language = [name for name, part in parts.items() if part == "language"]
    assert len(language) == 14
    assert all(".layers." in name and "vis" not in name for name in language)
    vision = [name for name, part in parts.items() if part == "vision"]
    assert len(vision) in (8, 10, 12)
    assert all("vis" in name and "merger" not in name for name in vision)
    assert list(parts.values()).count("connector") == CONNECTORS[family]
    assert [name for name, part in parts.items() if part == "head"] == ["lm_head"]


def test_a_model_that_cannot_be_split_shows_its_parts():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2))

        def get_encoder(self, modality):
            return self

        def get_decoder(self):
            return self

        def get_output_embeddings(self):
            return None

    with pytest.raises(ValueError, match=r"cannot split Flat .* among layers: Sequential\)"):
        components(Flat())


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_while_loading_gives_the_codes_of_quantizing_afterwards(checkpoint, family, method):
    loaded = load(checkpoint(family), method)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    expected = logits(model, loaded.processor)
    quantize(model, get(method), WHOLE)
    first, second = packed_layers(loaded.model), packed_layers(model)
    assert list(first) == list(second)
    assert len(first) == len(loaded.report.quantized) >= 22
    for name in first:
        for key, value in first[name].state_dict().items():
            assert torch.equal(value, second[name].state_dict()[key]), f"{name}.{key}"
    got = logits(loaded.model, loaded.processor)
    assert torch.equal(got, logits(model, loaded.processor))
    assert 0 < (got - expected).norm() / expected.norm() < 1
    assert not any(parameter.is_meta for parameter in (*loaded.model.parameters(), *loaded.model.buffers()))


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_on_every_family(checkpoint, family):
    """With zero-shot calibration, vision included; its answers are the model's own, whatever random weights say."""
    calibration = CalibrationSpec("self", samples=2, degenerate="allow")
    loaded = load(checkpoint(family), "awq", calibration=calibration)
    assert torch.isfinite(logits(loaded.model, loaded.processor)).all()
    assert {module.method for module in loaded.report.quantized} == {"awq"}
    assert all(0 < module.output_error < 1 for module in loaded.report.quantized)
    assert all(layer.in_scale is not None for layer in packed_layers(loaded.model).values())
    assert loaded.report.calibration.samples == 2
    assert loaded.report.calibration.tokens > 20


@pytest.mark.parametrize(
    ("method", "source", "warned"), [("gptq", "noise", 1), ("gptq", "demo", 0), ("awq", "noise", 0)]
)
def test_what_fits_correlations_is_warned_of_noise(checkpoint, method, source, warned):
    said = []
    handler = logger.add(said.append, level="WARNING", format="{message}")
    load(checkpoint("smolvlm"), method, calibration=CalibrationSpec(source, samples=2))
    logger.remove(handler)
    assert sum("those of noise are not those of text and images" in text for text in said) == warned


@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma"])
def test_none_is_the_model_as_it_is(checkpoint, family):
    loaded = load(checkpoint(family), "none", QuantPlan())
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    assert torch.equal(logits(loaded.model, loaded.processor), logits(plain, loaded.processor))
    report = loaded.report
    assert report.quantized == ()
    assert report.bytes_before == report.bytes_after
    assert report.bits_per_weight == 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models(checkpoint, dtype):
    loaded = load(checkpoint("qwen3_vl"), dtype=dtype)
    assert {layer.dtype for layer in packed_layers(loaded.model).values()} == {dtype}
    assert torch.isfinite(logits(loaded.model, loaded.processor)).all()
    language = [module for module in loaded.report.quantized if module.component == "language"]
    # 4 bits, and for every 32 weights a 16-bit scale with an 8-bit zero point, which int4 kernels want in 16 bits.
    extra = {"dequantize": 24, "torch CPU int4": 32}
    assert all(8 * module.bytes_after / module.weights == 4 + extra[module.kernel] / 32 for module in language)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "gemma3"])
def test_every_weight_is_accounted_for(checkpoint, family):
    loaded = load(checkpoint(family))
    report = loaded.report
    names = [module.name for module in report.modules]
    assert len(names) == len(set(names))
    weights = {name: p for name, p in loaded.model.named_parameters(remove_duplicate=False) if p.dim() > 1}
    assert len(report.skipped) == len(weights)
    assert all(module.reason for module in report.skipped)
    tensors = {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}.values()
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in tensors)
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    tensors = {id(t): t for t in (*plain.parameters(), *plain.buffers())}.values()
    assert report.bytes_before == sum(t.numel() * t.element_size() for t in tensors)
    for module in report.quantized:
        layer = loaded.model.get_submodule(module.name)
        assert module.bytes_after == sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers())
        dense = plain.get_submodule(module.name).weight.detach()
        assert module.relative_error == pytest.approx(float((dense - layer.weight).norm() / dense.norm()), rel=1e-5)


def test_a_projection_that_is_no_linear_layer_is_listed_with_the_reason(checkpoint):
    report = load(checkpoint("gemma3")).report
    (entry,) = [module for module in report.skipped if "mm_input_projection_weight" in module.name]
    assert entry.component == "connector"
    assert "not the weight of an nn.Linear" in entry.reason
    with pytest.raises(ValueError, match="asks to quantize connector"):
        load(checkpoint("gemma3"), plan=QuantPlan.from_arguments(bits=4, connector_bits=4))


def test_report_as_json_and_table(checkpoint):
    report = load(checkpoint("qwen2_5_vl"), plan=QuantPlan.from_arguments(bits=3, group_size=48, vision_bits=8)).report
    content = json.loads(report.to_json())
    assert content["quantized_layers"] + content["skipped_layers"] == len(content["modules"])
    assert content["plan"]["language"] == {"bits": 3, "group_size": 48, "symmetric": False}
    assert content["bytes_after"] < content["bytes_before"]
    assert {"bits_per_weight", "seconds", "peak_bytes"} <= set(content)
    padded = [module for module in report.quantized if module.padded_columns]
    assert padded
    assert f"{len(padded)} layers padded" in report.table()
    assert "language" in report.table()
    assert len(report.table().splitlines()) < 12


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_tied_head_is_untied_when_asked_for(checkpoint, method):
    calibration = CalibrationSpec("noise", samples=2) if method == "awq" else None
    plan = QuantPlan.from_arguments(bits=8, group_size=32, head_bits=8)
    loaded = load(checkpoint("paligemma"), method, plan, calibration=calibration)
    head, embedding = loaded.model.lm_head, loaded.model.get_input_embeddings().weight
    assert isinstance(head, PackedLinear)
    assert embedding.is_floating_point()
    assert (head.weight - embedding).abs().max() < 0.05 * embedding.abs().max()
    loaded.model.tie_weights()
    assert loaded.model.lm_head is head
    (entry,) = [module for module in loaded.report.quantized if module.component == "head"]
    assert entry.bytes_before == 0
    assert loaded.report.bytes_after == sum(
        t.numel() * t.element_size() for t in (*loaded.model.parameters(), *loaded.model.buffers())
    )


def test_rules_and_skips_reach_the_loader(checkpoint):
    plan = QuantPlan(
        language=QuantSpec(4, 32), rules=(Rule(r"layers\.1\..*down_proj", QuantSpec(8, 64)),), skip=("q_proj",)
    )
    layers = packed_layers(load(checkpoint("qwen2_5_vl"), plan=plan).model)
    assert len(layers) == 12
    bits = {name.rpartition(".")[2] + name.split(".")[3]: layer.spec.bits for name, layer in layers.items()}
    assert (bits["down_proj1"], bits["down_proj0"]) == (8, 4)


def test_calibration_is_reproducible_and_fingerprinted(checkpoint):
    def run(seed):
        return load(checkpoint("idefics3"), "awq", calibration=CalibrationSpec("self", samples=2, seed=seed))

    one, again, other = run(0), run(0), run(1)
    for name, layer in packed_layers(one.model).items():
        state = again.model.get_submodule(name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert one.report.calibration == again.report.calibration
    assert one.report.calibration.sha256 != other.report.calibration.sha256


def test_awq_without_a_word_about_calibration_is_zero_shot(checkpoint, monkeypatch):
    monkeypatch.setattr("lmms_plugin.quant_backends.checkpoints.loading.CalibrationSpec", _two_samples)
    assert load(checkpoint("qwen2_vl"), "awq").report.calibration.source == "self"


def _two_samples(source, **options):
    return CalibrationSpec(source, samples=2, **{k: v for k, v in options.items() if k != "samples"})


def test_a_quantized_model_deep_copies_and_changes_dtype(checkpoint):
    loaded = load(checkpoint("idefics3"))
    twin = copy.deepcopy(loaded.model)
    assert torch.equal(logits(twin, loaded.processor), logits(loaded.model, loaded.processor))


def edited(checkpoint, family, tmp_path, edit):
    """Copy a checkpoint with its tensors changed by `edit`."""
    target = tmp_path / family
    target.mkdir()
    for file in checkpoint(family).iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            edit(tensors)
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("method", ["rtn", "hqq", "awq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_name_their_layer(checkpoint, tmp_path, method, value):
    def poison(tensors):
        (name,) = [name for name in tensors if name.endswith("text_model.layers.1.mlp.up_proj.weight")]
        tensors[name][3, 5] = value

    path = edited(checkpoint, "idefics3", tmp_path, poison)
    calibration = CalibrationSpec("noise", samples=1) if method == "awq" else None
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the checkpoint's weight holds NaN or infinite"):
        load(path, method, calibration=calibration)


def test_missing_weights_are_an_error_not_a_random_start(checkpoint, tmp_path):
    def forget(tensors):
        (name,) = [name for name in tensors if name.endswith("text_model.layers.1.mlp.up_proj.weight")]
        del tensors[name]

    path = edited(checkpoint, "idefics3", tmp_path, forget)
    for method, plan in (("none", QuantPlan()), ("rtn", WHOLE)):
        with pytest.raises(ValueError, match=r"lacks 1 weights .*up_proj"):
            load(path, method, plan)


def test_scales_that_overflow_are_an_error(checkpoint, tmp_path):
    class Overflowing(CodesBackend):
        name = "rtn"
        bits = frozenset({4, 8})

        def quantize(self, weight, spec):
            codes = get("rtn").quantize(weight, spec)
            return Codes(codes.codes, codes.scale * float("inf"), codes.zero_point)

    model = AutoModelForImageTextToText.from_pretrained(checkpoint("idefics3"))
    with pytest.raises(ValueError, match="quantized weights are not finite"):
        quantize(model, Overflowing(), WHOLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "hqq", "plan": QuantPlan(language=QuantSpec(7))}, "hqq cannot quantize to 7 bits"),
        ({"method": "rtn", "calibration": CalibrationSpec("self")}, "takes no calibration"),
        ({"method": "awq", "calibration": CalibrationSpec("none")}, "calibration=none"),
        ({"method": "awqq"}, "did you mean 'awq'"),
        ({"method": "none"}, "plan asks for"),
    ],
    ids=["bits", "needless calibration", "no calibration", "unknown", "none"],
)
def test_bad_arguments_are_refused_before_anything_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("no/such-checkpoint", **arguments)


def test_a_plan_that_does_not_fit_is_refused_before_weights_are_read(checkpoint, tmp_path):
    path = edited(checkpoint, "idefics3", tmp_path, lambda tensors: tensors.clear())
    with pytest.raises(ValueError, match="matches no linear layer"):
        load(path, plan=QuantPlan(language=QuantSpec(4), skip=("nothing_like_this",)))


def test_a_checkpoint_quantized_elsewhere_is_refused(checkpoint, tmp_path):
    path = edited(checkpoint, "idefics3", tmp_path, lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized already \(awq\)"):
        load(path)


def test_stacks_that_cannot_be_taken_apart_are_listed_and_not_forgotten():
    """Llama 4 feeds all experts at once and does not declare how its stacks are laid out."""
    text = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 64, "head_dim": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "projector_input_dim": 64, "projector_output_dim": 64}
    vision |= {"vision_output_dim": 64}
    config = Llama4Config(text_config=text, vision_config=vision)
    work = quantize(
        AutoModelForImageTextToText.from_config(config), get("rtn"), QuantPlan.from_arguments(group_size=32)
    )
    modules = work.modules()
    experts = [module for module in modules if ".experts." in module.name]
    assert [len(module.shape) for module in experts] == [3, 3]
    assert all(
        module.component == "language" and "not the weight of an nn.Linear" in module.reason for module in experts
    )
    report = QuantReport("rtn", modules, 0, 0, 0.0, None, None, None, {})
    share, first = report.out_of_reach["language"]
    language = [module for module in modules if module.component == "language"]
    assert share == sum(module.weights for module in experts) / sum(module.weights for module in language)
    assert f"{share:.0%} of the weights of language are not quantized: they lie in no linear layer" in report.table()
    assert first in report.table()


def test_out_of_memory_says_what_helps(checkpoint, monkeypatch):
    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("lmms_plugin.quant_backends.methods.rtn_grid.round_to_nearest", exhaust)
    with pytest.raises(torch.OutOfMemoryError, match=r"while loading for rtn: device_map=auto .*Tried to allocate"):
        load(checkpoint("idefics3"))


def test_no_more_than_one_dense_layer_exists_while_loading(checkpoint, monkeypatch):
    """When a layer arrives, every earlier one is packed and every later one has no memory yet."""
    from lmms_plugin.quant_backends.quantization import Quantization

    dense = []
    original = Quantization.quantize

    def watch(self, name, weight):
        layers = {other: self.model.get_submodule(other) for other in self.specs}
        dense.append([other for other, m in layers.items() if isinstance(m, nn.Linear) and not m.weight.is_meta])
        original(self, name, weight)

    monkeypatch.setattr(Quantization, "quantize", watch)
    load(checkpoint("llava"))
    assert len(dense) == 26
    assert not any(dense)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_changes_nothing_but_the_place(checkpoint, device_map):
    options = {"plan": WHOLE, "calibration": CalibrationSpec("noise", samples=1)}
    mapped = load(checkpoint("qwen2_5_vl"), "awq", device_map=device_map, **options)
    plain = load(checkpoint("qwen2_5_vl"), "awq", **options)
    before, after = packed_layers(plain.model), packed_layers(mapped.model)
    assert list(before) == list(after)
    assert all(torch.equal(layer.weight, after[name].weight) for name, layer in before.items())


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_layers_on_disk_are_refused(checkpoint, method):
    device_map = {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="cannot be offloaded to disk; use a device_map without 'disk'"):
        load(
            checkpoint("qwen2_5_vl"),
            method,
            device_map=device_map,
            calibration=CalibrationSpec("noise", samples=1) if method == "awq" else None,
        )
