"""Quantized checkpoints on disk: whole or not at all, and the same model when they come back."""

import json
from pathlib import Path

import pytest
import torch
from helpers.families import BUILDERS, WITHOUT_ANSWERS
from PIL import Image
from safetensors import safe_open
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import answered, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.own_format import SavedConfig
from lmms_plugin.quant_backends.checkpoints.saving import pack_words, save_quantized
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.utils.outputs import expect_free

FAMILY = "qwen2_5_vl"


def quantized(path, method="rtn", *, dtype=torch.float32, options=None, calibration=None, **plan):
    arguments = {"bits": 4, "group_size": 32} | plan
    return load_quantized(
        str(path),
        backend=get(method, **(options or {})),
        plan=QuantPlan.from_arguments(**arguments),
        dtype=dtype,
        calibration=calibration,
    )


def saved_again(path, dtype=torch.float32):
    return load_quantized(str(path), backend=get("prequantized"), plan=QuantPlan(), dtype=dtype)


@torch.no_grad()
def logits(loaded):
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    output = loaded.model(**to_model(answered(loaded.model, loaded.processor, image, "Where?", "Here."), loaded.model))
    return output.logits if "logits" in output else output.logits_per_image


def tensors_on_disk(folder):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            found |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return found


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


CASES = {
    "rtn 4": ("rtn", {}, "compressed-tensors"),
    "rtn 8 whole rows": ("rtn", {"bits": 8, "group_size": -1, "symmetric": True}, "compressed-tensors"),
    "rtn 3, vision 5, head 2": ("rtn", {"bits": 3, "vision_bits": 5, "head_bits": 2}, "compressed-tensors"),
    "rtn padded": ("rtn", {"group_size": 40}, "lmms_plugin"),
    "rtn, 8-bit inputs": ("rtn", {"bits": 8, "options": {"act_bits": 8}}, "lmms_plugin"),
    "rtn, 4-bit inputs": ("rtn", {"options": {"activation_format": "int4"}}, "lmms_plugin"),
    "rtn nf4": ("rtn", {"options": {"format": "nf4", "activation_format": "fp8_e5m2"}}, "lmms_plugin"),
    "awq mxfp6": (
        "awq",
        {
            "bits": 6,
            "calibration": CalibrationSpec("noise", samples=1),
            "options": {
                "format": "mxfp6_e3m2",
                "activation_format": "int6",
                "activation_granularity": "tensor",
            },
        },
        "lmms_plugin",
    ),
    "hqq": ("hqq", {}, "lmms_plugin"),
    "awq": ("awq", {"calibration": CalibrationSpec("noise", samples=1)}, "lmms_plugin"),
    "ptqtp": ("ptqtp", {"bits": 3}, "lmms_plugin"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "options", "form"), CASES.values(), ids=CASES)
def test_answers_come_back_bit_for_bit(checkpoint, tmp_path, method, options, form, dtype):
    first = quantized(checkpoint(FAMILY), method, dtype=dtype, **options)
    saved = save_quantized(first.model, first.processor, first.report, tmp_path / "saved")
    assert saved.format == form
    assert (saved.reason is None) == (form == "compressed-tensors")
    second = saved_again(tmp_path / "saved", dtype)
    assert torch.equal(logits(second), logits(first))
    assert second.report.bytes_after == first.report.bytes_after
    before, after = quantized_layers(first.model), quantized_layers(second.model)
    assert list(before) == list(after)
    assert [layer.kernel for layer in before.values()] == [layer.kernel for layer in after.values()]
    assert [layer.bits for layer in before.values()] == [layer.bits for layer in after.values()]


@pytest.mark.parametrize("family", [name for name in BUILDERS if name != FAMILY])
def test_every_family_finds_its_tensors_again(checkpoint, tmp_path, family):
    # A retrieval model has no decoder; its heads are the language part, of which there may be nothing to quantize.
    others = {"language_bits": 16} if family in WITHOUT_ANSWERS else {"head_bits": 4}
    first = quantized(checkpoint(family), vision_bits=8, **others)
    save_quantized(first.model, first.processor, first.report, tmp_path / "saved")
    assert torch.equal(logits(saved_again(tmp_path / "saved")), logits(first))


@pytest.mark.parametrize("family", ["llava_onevision", "idefics3", "gemma3"])
def test_our_own_format_in_other_families(checkpoint, tmp_path, family):
    first = quantized(checkpoint(family), group_size=40, vision_bits=3)
    assert save_quantized(first.model, first.processor, first.report, tmp_path / "saved").format == "lmms_plugin"
    assert torch.equal(logits(saved_again(tmp_path / "saved")), logits(first))


def test_files_hold_no_dense_weight_of_a_quantized_layer(checkpoint, tmp_path):
    loaded = quantized(checkpoint(FAMILY), "hqq", head_bits=4)
    saved = save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    tensors = tensors_on_disk(tmp_path / "saved")
    names = [module.name for module in loaded.report.quantized]
    assert names
    assert not {f"{name}.weight" for name in names} & set(tensors)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # Buffers that are computed anew, rotary frequencies, are not stored.
    assert loaded.report.bytes_after * 0.98 < stored <= loaded.report.bytes_after
    assert saved.bytes > stored


def test_large_models_are_written_in_shards(checkpoint, tmp_path):
    loaded = quantized(checkpoint(FAMILY))
    save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved", shard_size="200KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(saved_again(tmp_path / "saved")), logits(loaded))


def test_report_and_dialect_go_along(checkpoint, tmp_path):
    loaded = quantized(checkpoint(FAMILY))
    loaded.model.config.grounding_dialect = "demo"
    save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "quant_report.json").read_text()) == loaded.report.to_dict()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["grounding_dialect"] == "demo"
    assert config["dtype"] == "float32"


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_compressed_tensors_library(bits):
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 1 << bits, (5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    packed = library.pack_to_int32(signed, bits)
    assert torch.equal(pack_words(codes, bits), packed)


@pytest.mark.parametrize(
    "plan",
    [{"bits": 4}, {"bits": 3, "symmetric": True}, {"bits": 8, "group_size": -1, "symmetric": True}],
    ids=["4 bits", "3 bits symmetric", "8 bits whole rows"],
)
def test_transformers_reads_compressed_tensors_without_this_package(checkpoint, tmp_path, plan):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForImageTextToText

    loaded = quantized(checkpoint(FAMILY), **plan)
    save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, layer in quantized_layers(loaded.model).items():
        assert type(plain.get_submodule(name)) is nn.Linear
        assert torch.equal(plain.get_submodule(name).weight, layer.weight)


def test_layers_of_a_library_are_refused_with_the_reason(checkpoint, tmp_path):
    loaded = quantized(checkpoint(FAMILY), "quanto", bits=8, group_size=-1)
    with pytest.raises(ValueError, match=r"save_quantized: model\..* is a TensorLinear \(quanto .*library's own form"):
        save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_an_unquantized_model_is_refused(checkpoint, tmp_path):
    loaded = load_quantized(str(checkpoint(FAMILY)), backend=get("none"), plan=QuantPlan())
    with pytest.raises(ValueError, match="nothing in this model is quantized"):
        save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")


def test_folders_that_are_taken_are_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    for taken in ("file", "full"):
        with pytest.raises(ValueError, match=f"{taken} is there already and not empty"):
            expect_free(tmp_path / taken)
    with pytest.raises(
        ValueError, match=f"--output: expected a path below .*, got the file {tmp_path}/file; name another"
    ):
        expect_free(tmp_path / "file" / "saved", "--output")
    assert expect_free(tmp_path / "nowhere" / "saved") == tmp_path / "nowhere" / "saved"
    assert not (tmp_path / "nowhere").exists()
    assert expect_free(tmp_path / "empty") == tmp_path / "empty"
    assert expect_free(tmp_path / "new") == tmp_path / "new"


def test_a_taken_folder_is_told_before_anything_is_loaded(tmp_path):
    from lmms_plugin.arguments import ModelArguments

    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is there already and not empty"):
        ModelArguments.parse({"pretrained": "demo", "save_quantized": str(tmp_path)})


def test_a_save_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    loaded = quantized(checkpoint(FAMILY))

    def fail(*_):
        assert any(tmp_path.glob(".saved.unfinished-*/*.safetensors")), "weights come before the processor"
        raise OSError("No space left on device")

    monkeypatch.setattr(loaded.processor, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused():
    with pytest.raises(ValueError, match=r"saved in version 99 .* reads up to 3"):
        SavedConfig(version=99, layers={}, method="rtn")


def test_a_model_that_has_run_is_saved_like_one_that_has_not(checkpoint, tmp_path):
    idle, used = (quantized(checkpoint(FAMILY), "hqq", dtype=torch.bfloat16) for _ in range(2))
    logits(used)
    for name, loaded in (("idle", idle), ("used", used)):
        save_quantized(loaded.model, loaded.processor, loaded.report, tmp_path / name)
    one, other = tensors_on_disk(tmp_path / "idle"), tensors_on_disk(tmp_path / "used")
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_model_argument_saves_what_quant_prequantized_loads(tmp_path):
    import lmms_plugin.vlm.wrapper as models

    # Folders above are made, too.
    folder, account = tmp_path / "new" / "saved", tmp_path / "reports" / "report.json"
    first = models.QuantRtn(pretrained="demo", bits=4, save_quantized=str(folder), report=str(account))
    packed = list(first.model.modules())
    # No request comes, and what was asked for is written all the same.
    first.clean()
    assert account.read_text() == first.report.to_json()
    second = models.QuantPrequantized(pretrained=str(folder))
    assert second.dialect.name == first.dialect.name == "demo"
    assert second.report.bytes_after == first.report.bytes_after
    pairs = zip(packed, second.model.modules(), strict=True)
    layers = [(one, other) for one, other in pairs if isinstance(one, PackedLinear)]
    assert len(layers) == len(first.report.quantized) == 28
    assert all(torch.equal(one.weight, other.weight) for one, other in layers)
