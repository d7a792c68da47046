"""Guard process that runs one command and ends it, with everything it started, when the guard's parent is gone.

It is a separate process because a runner that is killed with SIGKILL cannot clean up. The runner holds the other end of
this process's standard input, which the operating system closes however the runner ends.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LINUX = sys.platform == "linux"
_LOOK_SECONDS = 1.0


def start(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
    grace: float = 0.0,
) -> subprocess.Popen[bytes]:
    """Start a command under a guard, in a session of its own, which keyboard interrupts do not reach.

    Args:
        command: Command with the path of its program.
        log: File for its standard output and standard error.
        folder: Working directory; None for the current one.
        environment: Environment variables; None for those of this process.
        inherited: File descriptors that the guard keeps open.
        grace: Seconds between SIGTERM and SIGKILL when the command is ended; 0 for SIGKILL alone.
    """
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lmms_plugin.utils.processes.guard", f"{grace:g}", *command],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
            pass_fds=tuple(inherited),
        )


def end(guarded: subprocess.Popen[bytes]) -> None:
    """End a guarded command and everything it started, and wait until all of it has ended."""
    assert guarded.stdin is not None
    guarded.stdin.close()
    guarded.wait()


def run(command: Sequence[str], grace: float = 0.0) -> int:
    """Run a command in a process group of its own until it ends, standard input is closed or the parent is gone.

    On Linux, processes that have left the group are ended, too; elsewhere only the group is.

    Args:
        command: Command with the path of its program.
        grace: Seconds between SIGTERM and SIGKILL; 0 for SIGKILL alone.

    Returns:
        Exit status of the command; 128 plus the number of the signal that ended it.
    """
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=die_with_parent)
    threading.Thread(target=_end_without_parent, args=(child.pid, grace), daemon=True).start()
    status = child.wait()
    end_group(child.pid)
    return status if status >= 0 else 128 - status


def adopt_orphans() -> None:
    """Make what this process's descendants leave behind its children, on Linux."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_group(group: int) -> None:
    """End what is left of a process group, and on Linux what has left it."""
    _send(group, signal.SIGKILL)
    _end_orphans()


def _end_without_parent(group: int, grace: float) -> None:
    """End a group when standard input is closed, or when the parent is gone and a fork of it holds the other end."""
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            break
    if grace > 0:
        _send(group, signal.SIGTERM)
        # This thread ends with the process as soon as the command has ended.
        time.sleep(grace)
    _send(group, signal.SIGKILL)


def _send(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def die_with_parent() -> None:
    """Have this process killed when its parent ends, on Linux; elsewhere only a guard's input tells."""
    if _LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_orphans() -> None:
    """End what the command has left: Linux makes them children of this process, one generation after the other."""
    spared = set[int]()
    while orphans := _children() - spared:
        for orphan in orphans:
            try:
                os.kill(orphan, signal.SIGKILL)
                os.waitpid(orphan, 0)
            except PermissionError:
                # It has become another user's.
                spared.add(orphan)
            except (ProcessLookupError, ChildProcessError):
                continue


def _children() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*") if _LINUX else ():
        # A process may end while it is looked at. Its name may hold blanks and brackets; its parent is behind.
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(folder.name))
    return found


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], float(sys.argv[1])))
