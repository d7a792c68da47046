"""Runs one command and ends it, with everything it started, when whoever asked for it is gone.

A process of its own, since a runner that is killed with SIGKILL can do nothing any more: it holds the other end of this
process's standard input, which the system closes whatever became of the runner.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a command under a guard, in a session of its own, which an interrupt from the keyboard does not reach.

    Args:
        command: With the path of its program.
        log: File for its standard output and standard error.
        folder: Where it works; None for here.
        environment: Its variables; None for those of this process.
        inherited: File descriptors that the guard keeps open.
    """
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lmms_plugin.utils.processes.guard", *command],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
            pass_fds=tuple(inherited),
        )


def end(guarded: subprocess.Popen[bytes]) -> None:
    """End a guarded command and everything it started, and wait until that is so."""
    assert guarded.stdin is not None
    guarded.stdin.close()
    guarded.wait()


def run(command: Sequence[str]) -> int:
    """Run a command in a process group of its own until it ends or standard input does.

    Returns:
        Its exit status; 128 and the number of the signal that ended it.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_die_with_parent)
    threading.Thread(target=_kill_at_end_of_input, args=(child.pid,), daemon=True).start()
    status = child.wait()
    _kill(child.pid)
    return status if status >= 0 else 128 - status


def _kill_at_end_of_input(group: int) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    _kill(group)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _die_with_parent() -> None:
    # Should this process be killed itself; elsewhere than on Linux only its input tells.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
