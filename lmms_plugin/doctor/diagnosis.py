"""All checks, in processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from lmms_plugin.doctor.rows import DiagnosisRow, Status, fail

CHECKS: tuple[dict[str, str], ...] = (
    {"python": "packages:check_python", "packages": "packages:check_bounds", "lock": "packages:check_lock"},
    {"lmms-eval": "harness:check_evaluator", "models": "harness:check_models", "tasks": "harness:check_tasks"},
    {"gpu": "devices:check_gpus", "kernels": "devices:check_kernels"},
    {"hub": "hub_access:check_hub"},
    {"folders": "places:check_folders", "programs": "places:check_programs"},
    {"local copies": "local_datasets:check_copies"},
)
"""For each process check -> ``module:function`` below this package; together are those that import the same."""

EXTRA = "extra "
CLOSING = (
    "lmms-eval exits with status 0 even after an error: a run has worked if its *_results.json is there. "
    "Without one, read what it printed above its last line."
)
_TIMEOUT = 600
_PROGRAM = "lmms_plugin.doctor"


def diagnose() -> Iterator[DiagnosisRow]:
    """Run every check, a few at a time, and yield what they find in a fixed order."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for rows in pool.map(apart, (*map(tuple, CHECKS), *_extras())):
            yield from rows


def failed(rows: Iterable[DiagnosisRow]) -> bool:
    """Return whether anything is there that keeps runs from working."""
    return any(row.status is Status.FAIL for row in rows)


def _extras() -> list[tuple[str]]:
    try:
        from lmms_plugin.doctor.optional_libraries import extras

        return [(f"{EXTRA}{name}",) for name in extras()]
    except Exception:  # the check of packages says what is wrong with metadata
        return []


def apart(checks: Sequence[str]) -> list[DiagnosisRow]:
    """Run some checks in a process of their own; if it does not come to its end, that is the last row."""
    # -P: a folder called like a library in the working directory would be imported in its place.
    command = [sys.executable, "-P", "-m", _PROGRAM, *checks]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return [fail(", ".join(checks), f"did not end within {_TIMEOUT} seconds")]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [DiagnosisRow(**row | {"status": Status(row["status"])}) for row in found if row]
    if not found or found[-1] is not None:
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        rows.append(fail(", ".join(checks), f"the process that checks it {_end(done.returncode)}: {last}"))
    return rows


def _end(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"


def here(check: str) -> Iterator[DiagnosisRow]:
    """Run one check in this process; whatever it raises is its last row."""
    try:
        yield from _function(check)()
    except (Exception, SystemExit) as error:
        yield _failure(check, error)


def _function(check: str) -> Callable[[], Iterable[DiagnosisRow]]:
    if check.startswith(EXTRA):
        module = importlib.import_module("lmms_plugin.doctor.optional_libraries")
        return lambda: module.check_extra(check.removeprefix(EXTRA))
    name, _, attribute = next(checks[check] for checks in CHECKS if check in checks).partition(":")
    function: Callable[[], Iterable[DiagnosisRow]] = getattr(
        importlib.import_module(f"lmms_plugin.doctor.{name}"), attribute
    )
    return function


def _failure(check: str, error: BaseException) -> DiagnosisRow:
    try:
        from lmms_plugin.doctor.imports import explained

        return fail(check, *explained(error))
    except Exception:  # what explains errors needs a library, too
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        return fail(check, f"{type(error).__name__}: {error}", f"pip install {missing}" if missing else None)
