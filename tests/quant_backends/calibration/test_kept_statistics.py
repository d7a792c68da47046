"""What runs share in calibration: the same quantized weights to the last bit, whoever has computed the statistics."""

import ast
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.quantized_states import states
from safetensors.torch import load_file, save_file
from transformers import GenerationMixin

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.quant_backends import backend_class, get, names
from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.quant_backends.calibration import capture, kept_statistics, sequential
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.utils import tensor_files, variables


@pytest.fixture(autouse=True)
def no_journal(monkeypatch):
    monkeypatch.setenv(variables.CACHE, "")


def load(path, backend, bits=4, seed=0, vision=8, **options):
    plan = QuantPlan.from_arguments(bits=bits, group_size=32, vision_bits=vision)
    calibration = CalibrationSpec("self", samples=2, seed=seed)
    return load_quantized(str(path), backend=backend, plan=plan, calibration=calibration, **options)


def assert_same(one, other):
    first, second = states(one), states(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert one.report.modules == other.report.modules
    # All else about calibration is what it was, too.
    alike = [dataclasses.replace(each.report.calibration, taken={}) for each in (one, other)]
    assert alike[0] == alike[1]


def same(first, second):
    """Whether two files hold the same tensors; the order of what is said about them is not settled."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def counted(monkeypatch, owner, name):
    """Count the calls of a function."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)
    return calls


class Work:
    """What a run computes of the dense model."""

    def __init__(self, monkeypatch):
        self.calls = {
            "written": counted(monkeypatch, GenerationMixin, "generate"),
            "sensitivities": counted(monkeypatch, sequential, "measure_sensitivities"),
            "weights": counted(monkeypatch, sequential, "measure_token_weights"),
            "gathered": counted(monkeypatch, capture.Gathering, "noting"),
        }

    def done(self):
        found = {name for name, calls in self.calls.items() if calls}
        for calls in self.calls.values():
            calls.clear()
        return found


@pytest.fixture
def work(monkeypatch):
    return Work(monkeypatch)


METHODS = {
    **{name: get(name) for name in names() if issubclass(backend_class(name), CalibratedBackend)},
    "awq, tokens by gradient": get("awq", token_weights="gradient"),
    "awq, tokens by modality": get("awq", token_weights="modality"),
    "mbq, squares": get("mbq", loss="mse"),
    "awq, rotated": get("awq", rotation="hadamard"),
    "rounded inputs by modality": get("awq", activation_format="int8", activation_granularity="modality"),
}


@pytest.mark.parametrize("method", METHODS)
def test_shared_statistics_give_the_same_weights_to_the_last_bit(checkpoint, tmp_path, work, method):
    backend, path = METHODS[method], checkpoint("smolvlm")
    vision = 8 if 8 in backend.bits and "rotated" not in method else 16
    arms = (4, 3) if 4 in backend.bits else (3, 3)
    alone = {bits: load(path, backend, bits, vision=vision) for bits in sorted(set(arms))}
    assert work.done() >= {"written", "gathered"}
    for number, bits in enumerate(arms):
        expected = alone[bits]
        found = load(path, backend, bits, vision=vision, shared_folder=tmp_path)
        assert_same(expected, found)
        assert not expected.report.calibration.taken
        if not number:
            assert not found.report.calibration.taken
            assert work.done() >= {"written", "gathered"}
            continue
        # Sequential methods see quantized blocks, which nobody else has.
        assert work.done() == ({"gathered"} if backend.sequential else set())
        taken = found.report.calibration.taken
        assert taken["answers"] == 2
        assert ("statistics" in taken) != backend.sequential
        assert found.report.to_dict()["calibration"]["taken"] == taken


def test_methods_share_what_is_the_same_for_them(checkpoint, tmp_path, work):
    path = checkpoint("smolvlm")
    load(path, get("mbq"), shared_folder=tmp_path)
    assert work.done() == {"written", "sensitivities", "gathered"}
    assert_same(load(path, get("qig"), 3), load(path, get("qig"), 3, shared_folder=tmp_path))
    work.done()
    load(path, get("smoothquant"), 8, shared_folder=tmp_path)
    load(path, get("awq"), 8, shared_folder=tmp_path)
    assert work.done() == set()
    # Its rows that are held back are its own, and it gathers once for all bits.
    load(path, get("gptq"), shared_folder=tmp_path)
    assert work.done() == {"gathered"}
    load(path, get("gptq"), 3, shared_folder=tmp_path)
    assert work.done() == set()


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_experts_that_few_tokens_reach_are_the_same(checkpoint, tmp_path, work, method):
    path, backend = checkpoint("qwen3_vl_moe"), get(method)
    alone = load(path, backend, 3, vision=16)
    assert any((module.method or "").endswith(sequential.UNCALIBRATED) for module in alone.report.modules)
    load(path, backend, vision=16, shared_folder=tmp_path)
    work.done()
    found = load(path, backend, 3, vision=16, shared_folder=tmp_path)
    assert work.done() == set()
    assert found.report.calibration.taken["expert use"] == 1
    assert found.report.experts == alone.report.experts
    assert_same(alone, found)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"vision": 16}, {"family": "llava"}, {"dtype": torch.float64}], ids=str
)
def test_another_calibration_or_model_takes_nothing(checkpoint, tmp_path, change):
    load(checkpoint("smolvlm"), get("awq"), shared_folder=tmp_path)
    path = checkpoint(change.pop("family", "smolvlm"))
    found = load(path, get("awq"), shared_folder=tmp_path, **change)
    assert not found.report.calibration.taken
    assert_same(load(path, get("awq"), **change), found)


def test_another_number_of_threads_takes_nothing(checkpoint, tmp_path):
    path, threads = checkpoint("smolvlm"), torch.get_num_threads()
    load(path, get("awq"), shared_folder=tmp_path)
    torch.set_num_threads(threads + 1)
    try:
        assert not load(path, get("awq"), shared_folder=tmp_path).report.calibration.taken
    finally:
        torch.set_num_threads(threads)


def changed(content):
    """Content with another byte in the middle of its tensors."""
    place = len(content) * 3 // 4
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(changed(file.read_bytes())),
    ],
    ids=["gone", "cut off", "empty", "changed"],
)
@pytest.mark.parametrize("kind", ["* sums.safetensors", "* roles*.safetensors", "* layers.json", "sensitivities*.json"])
def test_what_is_damaged_is_computed_again(checkpoint, tmp_path, work, kind, damage):
    path = checkpoint("smolvlm")
    expected = load(path, get("mbq"), shared_folder=tmp_path)
    work.done()
    file = sorted(tmp_path.rglob(kind))[-1]
    before, tensors = file.read_bytes(), tensor_files.read(file)
    if tensors is not None:
        # They are mapped from the file that is about to change.
        tensors = {name: one.clone() for name, one in tensors.items()}
    damage(file)
    assert_same(expected, load(path, get("mbq"), shared_folder=tmp_path))
    assert work.done() == ({"sensitivities"} if "sensitivities" in kind else {"gathered"})
    again = tensor_files.read(file)
    assert file.read_bytes() == before if tensors is None else same(again, tensors)
    load(path, get("mbq"), shared_folder=tmp_path)
    assert work.done() == set()


def test_an_interrupted_run_leaves_whole_blocks(checkpoint, tmp_path, monkeypatch, work):
    path, backend = checkpoint("smolvlm"), get("awq")
    expected = load(path, backend)
    original, calls = type(backend).solve, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(backend), "solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(path, backend, shared_folder=tmp_path)
    found = load(path, backend, shared_folder=tmp_path)
    assert_same(expected, found)
    # Four groups of layers to a block: those of the two finished ones were there.
    assert found.report.calibration.taken == {"answers": 2, "statistics": 8}


def test_what_has_no_room_is_not_kept_and_said(checkpoint, tmp_path, monkeypatch, work, caplog):
    from loguru import logger

    said = []
    handle = logger.add(lambda message: said.append(str(message)), level="WARNING")
    monkeypatch.setattr(kept_statistics.KeptStatistics.__init__, "__defaults__", (1000,))
    path = checkpoint("smolvlm")
    try:
        load(path, get("mbq"), shared_folder=tmp_path)
    finally:
        logger.remove(handle)
    assert sum("GB of statistics are not kept" in line for line in said) == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    work.done()
    found = load(path, get("mbq"), 3, shared_folder=tmp_path)
    assert work.done() == {"gathered"}
    assert found.report.calibration.taken == {"answers": 2, "sensitivities": 1}
    assert_same(load(path, get("mbq"), 3), found)


ALONE = """
import sys
import torch
from safetensors.torch import save_file
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan

torch.set_num_threads(1)
path, folder, out = sys.argv[1:]
plan = QuantPlan.from_arguments(bits=4, group_size=32, vision_bits=8)
calibration = CalibrationSpec("self", samples=2)
loaded = load_quantized(path, backend=get("mbq"), plan=plan, calibration=calibration, shared_folder=folder)
save_file({name: value.clone() for name, value in loaded.model.state_dict().items()}, out)
print(loaded.report.calibration.taken)
"""


def test_two_at_a_time_write_answers_once_and_get_the_same(checkpoint, tmp_path):
    outs = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    arguments = [sys.executable, "-P", "-c", ALONE, str(checkpoint("smolvlm")), str(tmp_path / "shared")]
    processes = [subprocess.Popen([*arguments, str(out)], stdout=subprocess.PIPE, text=True) for out in outs]
    taken = [ast.literal_eval(process.communicate()[0].splitlines()[-1]) for process in processes]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    for kind, count in (("answers", 2), ("sensitivities", 1)):
        assert sorted(each.get(kind, 0) for each in taken) == [0, count]


def test_a_file_is_no_folder():
    with pytest.raises(ValueError, match="shared_folder: expected a folder, got the file"):
        ModelArguments.parse({"shared_folder": __file__})


def test_a_checkpoint_that_changed_in_place_takes_nothing(checkpoint, tmp_path):
    path = Path(shutil.copytree(checkpoint("smolvlm"), tmp_path / "copy"))
    load(path, get("awq"), shared_folder=tmp_path / "shared")
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if "language_model" in name or "text_model" in name)
    size = weights.stat().st_size
    save_file(tensors | {name: tensors[name] * 1.5}, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    found = load(path, get("awq"), shared_folder=tmp_path / "shared")
    assert not found.report.calibration.taken
    assert_same(load(path, get("awq")), found)


def test_a_folder_that_cannot_be_made_shares_nothing(checkpoint, tmp_path):
    path = checkpoint("smolvlm")
    (tmp_path / "calibration").write_text("")
    found = load(path, get("mbq"), shared_folder=tmp_path)
    assert not found.report.calibration.taken
    assert_same(load(path, get("mbq")), found)


def test_an_interrupted_run_goes_on_with_blocks_of_its_own_and_shared_statistics(checkpoint, tmp_path, monkeypatch):
    path, backend = checkpoint("smolvlm"), get("awq")
    expected = load(path, backend, 3)
    folders = {"shared_folder": tmp_path / "shared", "resume_folder": tmp_path / "resume"}
    for full in (False, True):
        original, calls = type(backend).solve, []

        def interrupted(self, *args, original=original, calls=calls):
            calls.append(args)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return original(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(type(backend), "solve", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load(path, backend, 3, **folders)
        assert list((tmp_path / "resume").rglob("*.block"))
        assert_same(expected, load(path, backend, 3, **folders))
        assert not list((tmp_path / "resume").rglob("*.block"))
        # The second time all statistics are there before it is interrupted.
        assert full or list((tmp_path / "shared").rglob("* sums.safetensors"))
