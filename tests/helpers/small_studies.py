"""A study small enough to be run by a test, a cell of it, and its run by the installed command."""

import signal
import subprocess
import sys
from pathlib import Path

from lmms_plugin.study.file.grid import Cell, CellAxes, Resources

PLUGIN = Path(sys.executable).parent / "lmms-plugin"
STUDY = """
models: [demo]
tasks: [shapes_rec]
limit: 2
batch_size: 2
resources: {gpus: 0}
grids:
  - {methods: [none, rtn], bits: [3]}
"""
CELL = Cell(
    CellAxes("demo", "rtn", 4, 128, "language", None, None),
    "rtn",
    {"pretrained": "demo", "bits": 4, "group_size": 128},
    ("shapes_rec",),
    None,
    1,
    Resources(gpus=0),
)


def write(folder: Path, text: str) -> Path:
    """Write the file of a study."""
    file = folder / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def start(file: Path, output: Path) -> "subprocess.Popen[str]":
    """Start a study, two cells at once."""
    command = [str(PLUGIN), "study", "run", str(file), "--output", str(output), "--jobs", "2"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=output.parent,
        # A shell has its background jobs ignore interrupts, and the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
