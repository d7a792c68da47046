"""What a user can get wrong, and what can go wrong underneath: one clear error each, and nothing half-written."""

import errno
import io
import json
import os
import resource
import signal
from contextlib import contextmanager

import datasets
import pytest
import torch
from loguru import logger
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import lmms_plugin.vlm.wrapper as models
from lmms_plugin.cli import main
from lmms_plugin.quant_backends.methods.awq import AwqBackend
from lmms_plugin.utils import variables


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(variables.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture
def path(checkpoint):
    return str(checkpoint("idefics3"))


def run(model="QuantAwq", **arguments):
    """Make the model of `--model quant_awq --model_args ...`, and load it as the first request does."""
    return getattr(models, model)(**{"device": "cpu", "group_size": 32, **arguments}).make_ready()


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def parquet(folder, images):
    """Write rows with the given image files and return what names them."""
    rows = [{"image": {"bytes": image, "path": None}, "caption": f"picture {i}"} for i, image in enumerate(images)]
    whole = datasets.Dataset.from_list(rows or [{"image": {"bytes": b"", "path": None}, "caption": ""}])
    whole.select(range(len(rows))).to_parquet(folder / "train.parquet")
    return f"dataset:{folder}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8, or 16 for untouched, got 1"),
        ({"bits": 9}, "bits must be an integer from 2 to 8"),
        ({"bits": 4.5}, "bits"),
        ({"bits": "four"}, "bits"),
        ({"group_size": 0}, "group_size must be a positive integer, or -1 for one group per row, got 0"),
        ({"group_size": -2}, "group_size must be a positive integer"),
        ({"language_bits": 16}, "awq was asked to quantize nothing"),
        ({"calibration_samples": 0}, "calibration_samples must be at least 1, got 0"),
        ({"calibration": "none"}, "calibration=none gives it nothing to look at"),
        ({"calibration": "self:tokens=0"}, "at least 1 token"),
        ({"calibration": "dataset:./nowhere"}, "neither an existing path nor a hub id"),
        ({"calibration": "dataset:some/where:split=test"}, "evaluation data"),
        ({"bit": 4}, "bit"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"report": "."}, "report: expected the name of a file, got the folder .; name a file in it"),
        ({"report": "/etc/hostname/below/report.json"}, "report: expected a path below folders"),
        ({"report": "/proc/report.json"}, "report: cannot write to /proc"),
        ({"save_quantized": "/proc/saved"}, "save_quantized: cannot write to /proc"),
        ({"save_quantized": "/etc/hostname/saved"}, "save_quantized: expected a path below folders for"),
        ({"features": "/etc/hostname"}, "features: expected a folder, got the file /etc/hostname"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_arguments_that_make_no_sense_are_refused_before_a_checkpoint_is_looked_for(arguments, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as failure:
        run(**{"pretrained": "demo", "bits": 4, **arguments})
    assert message in str(failure.value)


def test_a_rule_that_matches_nothing_is_refused_before_weights_are_read(path, tmp_path, monkeypatch):
    plan = tmp_path / "plan.yaml"
    plan.write_text("rules:\n  - {match: 'layers\\.7\\.', bits: 8}\n")

    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("lmms_plugin.quant_backends.checkpoints.loading.build_batches", read)
    with pytest.raises(
        ValueError, match=r"plan rule 'layers\\\\.7\\\\.' matches no linear layer \(layers are named like"
    ):
        run(pretrained=path, bits=4, plan=str(plan), calibration="noise")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "split 'train' holds no rows"),
        ([png()], r"asks for 2 samples, but .* has 1"),
        ([png(), b"no image at all"], r"calibration row [01] holds no readable image"),
        ([png(), png()[:60]], r"calibration row [01] holds no readable image"),
    ],
    ids=["empty", "too few", "no image", "cut off"],
)
def test_calibration_data_is_checked_before_a_model_is_loaded(tmp_path, monkeypatch, path, images, message):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        run(pretrained=path, bits=4, calibration=parquet(tmp_path, images), calibration_samples=2)


def edited(checkpoint, tmp_path, name, edit):
    """Copy a checkpoint with one tensor changed."""
    target = tmp_path / "edited"
    target.mkdir()
    for file in checkpoint("idefics3").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    (key,) = [key for key in tensors if key.endswith(name)]
    edit(tensors[key])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize("model", ["QuantRtn", "QuantAwq", "QuantPrequantized"])
def test_a_file_that_is_cut_off_is_named(checkpoint, tmp_path, model):
    path = edited(checkpoint, tmp_path, "text_model.norm.weight", lambda weight: None)
    file = tmp_path / "edited" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pretrained: .*model\.safetensors is damaged or cut off"):
        getattr(models, model)(pretrained=path, device="cpu").make_ready()


@contextmanager
def files_up_to(size):
    """Let no file grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("model", ["QuantRtn", "QuantPtqtp"], ids=["compressed-tensors", "own format"])
def test_a_full_disk_leaves_nothing_of_a_checkpoint(path, tmp_path, model):
    folder = tmp_path / "results"
    folder.mkdir()
    with (
        files_up_to(100_000),
        pytest.raises(OSError, match=r"save_quantized: .*saved could not be written .*too large"),
    ):
        run(model, pretrained=path, save_quantized=str(folder / "saved"))
    assert not list(folder.iterdir())


def test_a_full_disk_does_not_end_a_calibration(path, cache, monkeypatch):
    """What is lost is only the way back to where it was."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    warnings = []
    sink = logger.add(warnings.append, level="WARNING", format="{message}")
    arguments = {"pretrained": path, "bits": 4, "calibration": "noise", "calibration_samples": 1}
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            tried = run(**arguments).report
    finally:
        logger.remove(sink)
    assert len(warnings) == 2
    assert all("is not kept in" in warning and "interrupted, it is done again" in warning for warning in warnings)
    assert not list(cache.rglob("*unfinished-*"))
    assert tried.modules == run(**arguments).report.modules


@pytest.mark.parametrize("model", ["QuantRtn", "QuantHqq", "QuantAwq", "QuantGptq"])
def test_a_weight_that_is_nan_names_its_layer(checkpoint, tmp_path, model):
    def poison(weight):
        weight[2, 3] = torch.nan

    path = edited(checkpoint, tmp_path, "text_model.layers.1.mlp.up_proj.weight", poison)
    calibration = {"calibration": "noise", "calibration_samples": 1} if model in ("QuantAwq", "QuantGptq") else {}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: the checkpoint's weight holds NaN or infinite"):
        run(model, pretrained=path, bits=4, **calibration)


def test_activations_that_overflow_name_layer_and_sample(checkpoint, tmp_path, cache):
    """A norm that is not quantized blows them up, as float16 does with the outliers of some models."""

    def blow_up(weight):
        weight.fill_(1e38)

    path = edited(checkpoint, tmp_path, "text_model.layers.1.post_attention_layernorm.weight", blow_up)
    report = tmp_path / "report.json"
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.\w+: its inputs hold NaN or infinite .* sample 0"
    ) as failure:
        run(pretrained=path, bits=4, calibration="noise", calibration_samples=2, report=str(report))
    assert "dtype=bfloat16" in str(failure.value)
    assert not report.exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["device", "host tensor", "host"],
)
def test_out_of_memory_in_the_middle_says_what_helps_and_keeps_what_is_done(path, tmp_path, monkeypatch, cache, error):
    solve, calls = AwqBackend.solve, []

    def exhausted(self, *args):
        calls.append(args[2].names)
        if len(calls) == 6:
            raise error
        return solve(self, *args)

    report = tmp_path / "report.json"
    arguments = {"pretrained": path, "bits": 4, "calibration": "noise", "calibration_samples": 1, "report": str(report)}
    with monkeypatch.context() as patch:
        patch.setattr(AwqBackend, "solve", exhausted)
        with pytest.raises(torch.OutOfMemoryError) as failure:
            run(**arguments)
    assert "out of memory while loading for awq: device_map=auto" in str(failure.value)
    assert "fewer calibration_samples" in str(failure.value)
    assert not report.exists()
    (finished,) = cache.rglob("*.block")
    assert not list(cache.rglob("*unfinished-*"))
    assert run(**arguments).report.quantized
    assert json.loads(report.read_text())["quantized_layers"] == 14
    assert not finished.exists()


def test_other_errors_of_the_runtime_stay_what_they_are(path, monkeypatch):
    def broken(self, *args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(AwqBackend, "solve", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(pretrained=path, bits=4, calibration="noise", calibration_samples=1)


def inspect(monkeypatch, capsys, **arguments):
    """Run `lmms-plugin inspect` in this process; return its exit status, standard output and standard error."""
    named = {"method": "awq", "device": "cpu", "group_size": 32, "bits": 4, **arguments}
    text = ",".join(f"{key}={value}" for key, value in named.items())
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "inspect", text, "--json"])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    printed = capsys.readouterr()
    return exit_.value.code, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8, or 16 for untouched, got 1"),
        ({"group_size": 0}, "group_size must be a positive integer, or -1 for one group per row, got 0"),
        ({"plan": "PLAN"}, "plan rule 'nowhere' matches no linear layer"),
        ({"calibration": "EMPTY"}, "split 'train' holds no rows"),
        ({"calibration": "BROKEN"}, "calibration row 0 holds no readable image"),
        ({"error": torch.OutOfMemoryError("Tried to allocate 2 GiB")}, "out of memory while loading for awq"),
    ],
    ids=["bits", "group size", "rule", "empty", "corrupt", "out of memory"],
)
def test_the_command_gives_one_line_and_writes_nothing(path, tmp_path, monkeypatch, capsys, cache, arguments, message):
    (tmp_path / "plan.yaml").write_text("rules: [{match: nowhere, bits: 8}]\n")
    data = tmp_path / "data"
    data.mkdir()
    stand_ins = {
        "PLAN": lambda: str(tmp_path / "plan.yaml"),
        "EMPTY": lambda: parquet(data, []),
        "BROKEN": lambda: parquet(data, [b"no image"]),
    }
    given = {key: stand_ins[value]() if value in stand_ins else value for key, value in arguments.items()}
    if error := given.pop("error", None):
        monkeypatch.setattr(AwqBackend, "solve", lambda *_: (_ for _ in ()).throw(error))
    given = {"calibration": "noise", "calibration_samples": 1, **given}
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    status, output, errors = inspect(monkeypatch, capsys, pretrained=path, report=tmp_path / "report.json", **given)
    assert status == 2
    assert not output
    (line,) = [line for line in errors.splitlines() if line.startswith("lmms-plugin: ")]
    assert message in line
    assert errors.rstrip().endswith(line)
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == before
