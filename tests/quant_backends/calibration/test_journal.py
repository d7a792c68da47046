"""An interrupted calibration goes on at the last finished block, with the result of an undisturbed one."""

import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.quantized_states import states
from torch import nn

from lmms_plugin import quant_backends
from lmms_plugin.arguments import ModelArguments
from lmms_plugin.quant_backends import backend_class, get, names
from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.quant_backends.calibration import journal
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.methods.awq import AwqBackend
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.utils import hashing, variables

PLAN = QuantPlan.from_arguments(bits=4, group_size=32, vision_bits=8)

KILLED = """
import os, signal, sys
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.methods.awq import AwqBackend
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan

import torch
torch.set_num_threads(1)
solve, calls = AwqBackend.solve, 0

def dying(self, layers, specs, statistics):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return solve(self, layers, specs, statistics)

AwqBackend.solve = dying
plan = QuantPlan.from_arguments(bits=4, group_size=32, vision_bits=8)
load_quantized(sys.argv[1], backend=get("awq"), plan=plan, calibration=CalibrationSpec("self", samples=2))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(variables.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def load(path, backend=None, samples=2, seed=0, **options):
    calibration = CalibrationSpec("self", samples=samples, seed=seed)
    return load_quantized(str(path), backend=backend or get("awq"), plan=PLAN, calibration=calibration, **options)


def assert_same(one, other):
    first, second = states(one), states(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [m.output_error for m in one.report.modules] == [m.output_error for m in other.report.modules]
    assert one.report.calibration == other.report.calibration


def counted(monkeypatch, owner, name):
    """Count the calls of a method."""
    original, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(owner, name, method)
    return calls


def interrupt(path, backend, calls, monkeypatch, **options):
    """Press a key when nine groups of layers have been solved, the ninth of them in the third block."""
    original = AwqBackend.solve

    def interrupted(self, *args):
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(AwqBackend, "solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(path, backend, **options)


def test_a_calibration_that_was_killed_goes_on_at_the_last_finished_block(checkpoint, cache, monkeypatch):
    path = checkpoint("idefics3")
    # Sixteen groups of layers in four blocks; the fifteenth is in the last one.
    command = [sys.executable, "-P", "-c", KILLED, str(path), "15"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    (folder,) = cache.iterdir()
    assert len(list(folder.rglob("*.block"))) == 3

    solved, noted = counted(monkeypatch, AwqBackend, "solve"), counted(monkeypatch, journal.Journal, "note")
    resumed = load(path)
    assert len(solved) == 4
    assert not noted, "the answers that were written before"
    assert not any(cache.iterdir())
    solved.clear()
    undisturbed = load(path)
    assert len(solved) == 16
    assert {name for name, _ in noted} == {"written"}
    assert_same(resumed, undisturbed)


@dataclass(frozen=True)
class Sequential(AwqBackend):
    """AWQ on what quantized blocks put out."""

    sequential = True


@pytest.mark.parametrize("backend", [AwqBackend(), Sequential()], ids=["original", "sequential"])
def test_an_interrupt_from_the_keyboard(checkpoint, cache, monkeypatch, backend):
    path = checkpoint("idefics3")
    calls = counted(monkeypatch, AwqBackend, "solve")
    undisturbed = load(path, backend)
    total = len(calls)
    calls.clear()
    interrupt(path, backend, calls, monkeypatch)
    calls.clear()
    resumed = load(path, backend)
    # Four groups to a block: the two finished ones are not solved again.
    assert len(calls) == total - 8
    assert_same(resumed, undisturbed)
    assert not any(cache.iterdir())


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"samples": 3}, {"checkpoint": "llava"}, {"backend": Sequential()}], ids=str
)
def test_another_calibration_takes_nothing_over(checkpoint, monkeypatch, change):
    calls = counted(monkeypatch, AwqBackend, "solve")
    interrupt(checkpoint("smolvlm"), None, calls, monkeypatch)
    calls.clear()
    load(checkpoint(change.pop("checkpoint", "smolvlm")), **change)
    assert len(calls) == 16


def calibrated_methods():
    return [name for name in names() if issubclass(backend_class(name), CalibratedBackend)]


@pytest.mark.parametrize("method", calibrated_methods())
@torch.no_grad()
def test_every_methods_layers_come_back_as_they_were(tmp_path, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 48))
    layer = get(method).without_inputs(model[0], QuantSpec(get(method).default_bits, 32))
    x = torch.randn(3, 100)
    record = journal.Journal(tmp_path, {})
    expected = layer(x)
    record.save("block", {"0": journal.Solved(layer, 0.25, "how", 3)})
    (entry,) = record.load("block", model).values()
    assert entry[1:] == (0.25, "how", 3)
    assert type(entry.layer) is type(layer)
    assert torch.equal(entry.layer(x), expected)
    assert torch.equal(entry.layer.weight, layer.weight)
    assert entry.layer.weight_bytes == layer.weight_bytes
    assert entry.layer.bias is model[0].bias
    assert record.load("another", model) is None


def test_nothing_is_kept_where_the_cache_is_turned_off(checkpoint, cache, monkeypatch):
    monkeypatch.setenv(variables.CACHE, "")
    assert journal.cache_folder() is None
    load(checkpoint("smolvlm"))
    assert not cache.exists()


def test_a_tilde_in_the_variable_is_the_home_folder_of_somebody(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variables.CACHE, "~/kept")
    assert journal.cache_folder() == tmp_path / "kept" / "calibration"
    monkeypatch.setenv(variables.CACHE, "~nosuchuser/y")
    with pytest.raises(ValueError, match=r"^LMMS_PLUGIN_CACHE=~nosuchuser/y: .* ~nosuchuser has no home folder here"):
        journal.cache_folder()


def test_the_folder_can_be_named_and_nothing_kept(checkpoint, tmp_path, cache, monkeypatch):
    path, named = checkpoint("smolvlm"), tmp_path / "named"
    calls = counted(monkeypatch, AwqBackend, "solve")
    interrupt(path, None, calls, monkeypatch, resume_folder=named)
    assert len(list(named.rglob("*.block"))) == 2
    assert not cache.exists()
    calls.clear()
    load(path, resume_folder=named)
    assert len(calls) == 8
    assert not any(named.iterdir())
    calls.clear()
    interrupt(path, None, calls, monkeypatch, resume=False)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"resume": False, "resume_folder": "somewhere"},
            "resume=False keeps nothing, but resume_folder names somewhere",
        ),
        ({"resume_folder": __file__}, "resume_folder: .* is a file"),
    ],
    ids=["nothing to keep", "a file"],
)
def test_arguments_that_cannot_be_meant_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments.parse(given)


def test_a_changed_file_is_another_checkpoint_and_a_copy_is_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(b"weights")
    shutil.copytree(tmp_path / "one", tmp_path / "copy", copy_function=shutil.copyfile)

    def key(folder):
        return hashing.of_source(str(tmp_path / folder), lambda _: None)

    assert key("copy") == key("one")
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"weighed")
    assert key("copy") != key("one")


def test_on_the_hub_the_commit_tells_checkpoints_apart():
    one, other, unknown = (hashing.of_source("somebody/model", lambda _, c=commit: c) for commit in ("a", "b", None))
    assert one == {"repository": "somebody/model", "revision": "a"}
    assert len({str(key) for key in (one, other, unknown)}) == 3


def test_a_changed_byte_in_a_folder_within_changes_the_key_of_the_code(tmp_path, monkeypatch):
    package = Path(quant_backends.__file__).parent
    shutil.copytree(package, tmp_path / "room", ignore=shutil.ignore_patterns("__pycache__"))
    inner = tmp_path / "room" / "methods"
    inner.joinpath("rounding.py").write_bytes(b"LEVELS = 15\n")
    monkeypatch.setattr(quant_backends, "__file__", str(tmp_path / "room" / "__init__.py"))
    before = journal.code_key()
    assert journal.code_key() == before
    inner.joinpath("rounding.py").write_bytes(b"LEVELS = 16\n")
    changed = journal.code_key()
    assert changed != before
    inner.joinpath("rounding.py").rename(inner / "grid.py")
    assert journal.code_key() not in (before, changed)
