"""Folders that a run writes to, and programs that it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lmms_plugin.doctor.rows import DiagnosisRow, fail, ok, warn
from lmms_plugin.utils import variables

GIB = 1 << 30
_TRIED = 1 << 20


def check_folders() -> Iterator[DiagnosisRow]:
    """Try the caches of Hugging Face, the folder of calibrations, and that of temporary files."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    # What a checkpoint of seven billion parameters takes; RefCOCO+'s three splits; the blocks of such a checkpoint.
    yield written("models", Path(HF_HUB_CACHE), 16 * GIB, "set HF_HUB_CACHE or HF_HOME to another folder")
    yield written("datasets", datasets, 4 * GIB, "set HF_DATASETS_CACHE or HF_HOME to another folder")
    if os.environ.get(variables.CACHE) != "":
        yield _calibrations(Path(HF_HOME) / "lmms_plugin")
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield fail("temporary files", str(error), "set TMPDIR to another folder")
        return
    yield written("temporary files", temporary, GIB, "set TMPDIR to another folder")


def _calibrations(default: Path) -> DiagnosisRow:
    remedy = f"set {variables.CACHE} to another folder, or to nothing to keep none"
    try:
        folder = variables.folder(variables.CACHE) or default
    except ValueError as error:
        return fail("folder of calibrations", str(error), remedy)
    return written("calibrations", folder, 4 * GIB, remedy)


def written(what: str, folder: Path, wanted: int, remedy: str) -> DiagnosisRow:
    """Write a file into a folder, or into what there is of the path to it, and look at the space that is left.

    Args:
        what: Will be kept there.
        folder: Need not exist yet; it is not made.
        wanted: Bytes below which there is a warning.
        remedy: What to do where there is too little space.
    """
    check = f"folder of {what}"
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            # Buffers and zeros would not show that a disk is full.
            file.write(os.urandom(_TRIED))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        reason = f"{there} is a file, no folder" if there.is_file() else error.strerror or error
        return fail(check, f"{folder}: nothing can be written there: {reason}", remedy)
    message = f"{folder}: {free / GIB:.1f} GiB free"
    return ok(check, message) if free >= wanted else warn(check, f"{message}, below {wanted / GIB:.0f}", remedy)


def check_programs() -> Iterator[DiagnosisRow]:
    """Look for the programs that some tasks and methods start."""
    java = shutil.which("java")
    problem = "no `java` is on the PATH" if java is None else _does_not_start(java, "-version")
    if problem:
        yield warn(
            "java",
            f"{problem}; coco_caption_* tasks need it, no other",
            "install a Java runtime (default-jre-headless)",
        )
    else:
        yield ok("java", f"{java}, for coco_caption_* tasks")
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler)
    problem = f"no `{compiler}` is on the PATH" if found is None else _does_not_start(found, "--version")
    if problem:
        yield warn("compiler", f"{problem}; quant_quanto at 4 and 2 bits needs it, no other", "install g++")
    else:
        yield ok("compiler", f"{found}, for quant_quanto")


def _does_not_start(program: str, *arguments: str) -> str | None:
    """Return what goes wrong, None if nothing does; some systems have a `java` that only says where to get one."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} cannot be started: {error}"
    return f"{program} says: {(done.stderr or done.stdout).strip()}" if done.returncode else None
