"""llama.cpp's own converter, run as it is, for families that are not written here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SAID = 300
_SECONDS = 3600 * 12


def expect_converter(path: Path) -> Path:
    """Refuse what cannot be llama.cpp's converter.

    Raises:
        ValueError: There is no such file.
    """
    if not path.is_file():
        raise ValueError(
            f"converter: expected llama.cpp's convert_hf_to_gguf.py, or a command that runs it, and there is none "
            f"at {path}"
        )
    return path


def convert(converter: Path, checkpoint: Path, outfile: Path, outtype: str, *, vision: bool) -> None:
    """Write one file of a checkpoint.

    Args:
        converter: `convert_hf_to_gguf.py` of a copy of llama.cpp, or a program that runs it (for an environment of its
            own, since it brings its own `gguf`).
        checkpoint: Folder.
        outfile: To write.
        outtype: `f32`, `f16` or `bf16`.
        vision: Whether the vision tower and its connector are written, and not the language model.

    Raises:
        ValueError: The converter fails, or writes nothing; holds its last words.
    """
    program = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    command = [*program, str(checkpoint), "--outfile", str(outfile), "--outtype", outtype]
    done = subprocess.run(
        command + ["--mmproj"] * vision, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
    )
    if done.returncode or not outfile.is_file():
        said = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])[-_SAID:]
        what = "vision tower" if vision else "language model"
        raise ValueError(f"{converter.name} does not convert the {what} of {checkpoint}: {said or 'it says nothing'}")
