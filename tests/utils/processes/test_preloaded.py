"""Commands in copies of a process of imported libraries: their status, their end, and what a crash leaves alone."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lmms_plugin.utils.processes import preloaded
from lmms_plugin.utils.processes.preloaded import Preloaded

pytestmark = pytest.mark.skipif(not preloaded.POSSIBLE, reason="Linux alone")
SCRIPT = """
import os, signal, subprocess, sys, time
print(sorted({"torch", "lmms_plugin"} & set(sys.modules)), os.getcwd(), os.environ["SAID"], sys.argv[1:], flush=True)
if sys.argv[1] == "leave":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open("child", "w").write(str(child.pid))
    sys.exit(3)
if sys.argv[1] == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if sys.argv[1] == "wait":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(600)
"""


GPUS = """
import json, os, sys
from importlib import import_module
imported = "torch" in sys.modules
cuda = import_module("torch").cuda
found = {"imported": imported, "visible": os.environ["CUDA_VISIBLE_DEVICES"], "bad": cuda._is_in_bad_fork()}
found["initialised"] = cuda.is_initialized()
if cuda.is_available():
    found |= {"count": cuda.device_count(), "sum": import_module("torch").ones(3, device="cuda").sum().item()}
print(json.dumps(found))
"""
SPOILING = "import torch\ntorch._C._cuda_getDeviceCount()\n"
"""As torchao does while it is imported: it asks the driver, which no copy outlives."""


@contextmanager
def preloaded_with(folder, *names, **environment):
    """Some libraries in the place of those that are named, which take seconds to import: the mechanism is the same."""
    few = f"import lmms_plugin.utils.processes.preloaded as p; p.LIBRARIES = {names}; p.main()"
    with pytest.MonkeyPatch.context() as patch:
        start = preloaded.guard.start

        def of_few(command, log, **given):
            return start([sys.executable, "-P", "-c", few, command[-1]], log, **given)

        patch.setattr(preloaded.guard, "start", of_few)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = Preloaded.start({**os.environ, "PYTHONPATH": path, **environment}, folder / "log")
    try:
        yield process
    finally:
        process.end()
    assert process.over


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    with preloaded_with(tmp_path_factory.mktemp("preloaded"), "json") as process:
        yield process


def gpus_of(libraries, folder, visible):
    """What a copy that may see some GPUs finds out about them."""
    (folder / "gpus.py").write_text(GPUS)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    command, out = [str(folder / "gpus.py")], folder / "out"
    assert libraries.run(command, folder=folder, environment=environment, stdout=out).wait() == 0, out.read_text()
    return json.loads(out.read_text().splitlines()[-1])


def run(libraries, folder, what, **given):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "SAID": "this"}
    return libraries.run([str(script), what], folder=folder, environment=environment, stdout=folder / "out", **given)


def gone(pid):
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        # It has ended; whoever has adopted it has not asked for its status yet.
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def written(file):
    for _ in range(600):
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.05)
    raise AssertionError(f"expected {file}")


def test_a_copy_has_folder_environment_arguments_and_status_of_its_own(libraries, tmp_path):
    copy = run(libraries, tmp_path, "leave", stderr=tmp_path / "err")
    assert copy.wait() == 3
    # This package is imported by the copy itself, as it is now.
    assert (tmp_path / "out").read_text() == f"[] {tmp_path} this ['leave']\n"
    assert gone(written(tmp_path / "child"))


def test_a_crash_is_told_and_reaches_nobody_else(libraries, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    waiting, crashing = run(libraries, tmp_path / "a", "wait"), run(libraries, tmp_path / "b", "crash")
    assert crashing.wait() == 128 + signal.SIGSEGV
    pid = written(tmp_path / "a" / "pid")
    assert waiting.poll() is None
    waiting.end()
    assert waiting.returncode == 128 + signal.SIGKILL
    assert gone(pid)
    assert run(libraries, tmp_path, "leave").wait() == 3


def test_a_lock_is_held_as_long_as_the_copy_runs(libraries, tmp_path):
    reading, writing = os.pipe()
    copy = run(libraries, tmp_path, "wait", inherited=(writing,))
    os.close(writing)
    os.set_blocking(reading, False)
    written(tmp_path / "pid")
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    copy.end()
    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_copies_end_with_the_process_they_are_of(libraries, tmp_path):
    copy = run(libraries, tmp_path, "wait")
    pid = written(tmp_path / "pid")
    guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    assert copy.wait() == 128 + signal.SIGKILL
    assert gone(pid)


def test_the_process_has_not_initialised_cuda_and_a_copy_without_gpus_has_its_libraries(tmp_path):
    with preloaded_with(tmp_path, "torch", CUDA_VISIBLE_DEVICES="") as process:
        found = gpus_of(process, tmp_path, "")
    # A fork is bad where the process before it has asked the driver anything.
    assert found == {"imported": True, "visible": "", "bad": False, "initialised": False}


@pytest.mark.parametrize("spoilt", [True, False], ids=["driver asked by an import", "no such GPU"])
def test_a_copy_that_cannot_use_its_gpus_starts_the_command_anew(tmp_path, spoilt):
    (tmp_path / "spoiling.py").write_text(SPOILING)
    names = ("torch", "spoiling") if spoilt else ("torch",)
    with preloaded_with(tmp_path, *names, CUDA_VISIBLE_DEVICES="7") as process:
        found = gpus_of(process, tmp_path, "5,6")
        assert (found["imported"], found["visible"], found["bad"]) == (False, "5,6", False)
        # For one that needs none, nothing is spoilt.
        assert gpus_of(process, tmp_path, "")["imported"]


def test_a_process_that_holds_a_gpu_starts_anew_without_libraries(tmp_path):
    (tmp_path / "holding.py").write_text("import torch\ntorch.cuda.is_initialized = lambda: True\n")
    with preloaded_with(tmp_path, "holding", CUDA_VISIBLE_DEVICES="7") as process:
        for visible in ("5,6", ""):
            found = gpus_of(process, tmp_path, visible)
            assert (found["imported"], found["visible"], found["bad"]) == (False, visible, False)
    assert "commands import by themselves" in (tmp_path / "log").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_compute_on_a_gpu_of_their_own(tmp_path):
    with preloaded_with(tmp_path, "torch", CUDA_VISIBLE_DEVICES="0") as process:
        for _ in range(2):
            found = gpus_of(process, tmp_path, "0")
            assert found == {
                "imported": True,
                "visible": "0",
                "bad": False,
                "initialised": False,
                "count": 1,
                "sum": 3.0,
            }
