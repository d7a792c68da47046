"""Virtual environments that have the libraries of this one, but not this package: installing it is then real."""

import os
import subprocess
import sys
from pathlib import Path

OURS = ("lmms_plugin", "__editable__.lmms_plugin", "__editable___lmms_plugin")
ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment with the libraries of the running one linked in."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.folder = folder
        libraries = folder / "libraries"
        libraries.mkdir()
        # The running environment may itself see another one's libraries; what comes first on the path is what counts.
        for place in dict.fromkeys(Path(entry) for entry in sys.path if Path(entry).name == "site-packages"):
            for entry in place.iterdir():
                link = libraries / entry.name
                if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not link.is_symlink():
                    link.symlink_to(entry)
        self.site = next(folder.glob("lib/python*/site-packages"))
        (self.site / "libraries.pth").write_text(f"{libraries}\n")

    def install(self, *arguments: str) -> None:
        """Install with pip, offline and without touching the linked libraries."""
        self.python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *arguments)

    def python(self, *arguments: str, **more: str) -> str:
        """Output of the environment's Python, run away from any checkout; raises with its output if it fails."""
        return run([str(self.folder / "bin" / "python"), *arguments], cwd=self.folder, **more)

    def command(self, name: str, *arguments: str, **more: str) -> str:
        """Output of an installed command; those of linked libraries are run by this environment's Python."""
        own = self.folder / "bin" / name
        return self.python(str(own if own.exists() else Path(sys.executable).parent / name), *arguments, **more)


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Run a command with one thread and no network; its output, or an error that shows it."""
    return output_of(subprocess.run(command, cwd=cwd, env=settings(**environment), capture_output=True, text=True))


def settings(**environment: str) -> dict[str, str]:
    """Variables of a command with one thread and no network, and those that are given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LMMS_", "PYTHONPATH", "RANK", "WORLD_SIZE"))}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    return {**clean, **fixed, **environment}


def output_of(done: "subprocess.CompletedProcess[str]") -> str:
    """Output of a command that has ended, or an error that shows it."""
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)} exited with {done.returncode}:\n{output[-8000:]}")
    return output
