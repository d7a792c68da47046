"""Install the built wheel into a new environment without the lock, and see that the main command runs there.

    make fresh

This is what a user gets who types `pip install` today. A failure names the distributions whose versions differ from
constraints.txt, with which the tests passed. Everything lies in one temporary folder (7 GB), which is removed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
TASKS = ("refcocoplus_shift", "shapes_rec", "refcocoplus_shift_testB_gaussian_noise_3")
MODELS = {"quant_none": "pretrained=demo", "quant_awq": "pretrained=demo,bits=4"}
# What differs on every machine and changes nothing that runs.
INSTALLERS = {"pip", "wheel"}
COMMANDS = """
import typer
from lmms_plugin.cli.main import app

def walk(command, words):
    print(*words)
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            walk(below, [*words, name])

walk(typer.main.get_command(app), [])
"""


class Broken(Exception):
    """Something that a user would have seen fail."""


class Fresh:
    """An environment without anything but what installing the wheel brought."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        # Whatever is set for this checkout must not help, and a user has set nothing. A hub that cannot be reached is
        # asked five times before lmms-eval goes on; the demo needs none.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LMMS_", "PYTHON", "VIRTUAL_ENV"))}
        self.environment = {**kept, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def run(self, *command: str, says: tuple[str, ...] = ()) -> str:
        """Run a command of the environment, away from the checkout.

        Raises:
            Broken: If it fails, or does not say what is expected.
        """
        shown = " ".join(word if "\n" not in word else "..." for word in command)
        started = time.monotonic()
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        missing = [text for text in says if text not in done.stdout]
        if done.returncode or missing:
            wanted = f", without {', '.join(missing)} in its output" if missing else ""
            raise Broken(f"{shown}\nended with exit status {done.returncode}{wanted}:\n{done.stdout[-4000:]}")
        print(f"{time.monotonic() - started:6.0f} s  {shown}", flush=True)
        return done.stdout

    def evaluate(self, model: str, arguments: str) -> None:
        """Run the main command on the demo, and look for its results: lmms-eval exits with 0 after an error, too."""
        output = self.folder / model
        command = ["lmms-eval", "--model", model, "--model_args", arguments, "--tasks", "shapes_rec", "--limit", "2"]
        said = self.run(*command, "--output_path", str(output))
        if not list(output.rglob("*_results.json")):
            raise Broken(f"{' '.join(command)}\nleft no results file:\n{said[-4000:]}")

    def differing(self) -> list[str]:
        """Distributions whose versions are not those of the lock."""
        lines = re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
        locked = {_canonical(name): version for name, version in lines}
        listed = subprocess.run(
            [str(self.bin / "python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        found = {_canonical(one["name"]): one["version"].partition("+")[0] for one in json.loads(listed.stdout)}
        return [
            f"{name}: locked {locked.get(name, 'not')}, installed {version}"
            for name, version in sorted(found.items())
            if locked.get(name) != version and name not in INSTALLERS | {"lmms-plugin"}
        ]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wheel(folder: Path) -> Path:
    """Build the wheel of a copy of what git does not ignore, so that no build folder of the checkout can be in it."""
    sources = folder / "sources"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for file in filter(Path.is_file, (ROOT / name for name in listed.split("\0") if name)):
        copy = sources / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-cache-dir", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(sources)], cwd=folder, check=True)
    (built,) = folder.glob("*.whl")
    return built


def check(fresh: Fresh) -> None:
    """Install and use the package as a newcomer would.

    Raises:
        Broken: If anything of it fails.
    """
    built = wheel(fresh.folder)
    subprocess.run([sys.executable, "-m", "venv", str(fresh.bin.parent)], check=True)
    fresh.run("python", "-m", "pip", "install", "--quiet", "--no-cache-dir", str(built))
    fresh.run("python", "-m", "pip", "check")
    fresh.run("lmms-eval", "--tasks", "list", says=tuple(f" - {task}\n" for task in TASKS))
    for model, arguments in MODELS.items():
        fresh.evaluate(model, arguments)
    for words in fresh.run("python", "-c", COMMANDS).splitlines():
        fresh.run("lmms-plugin", *words.split(), "--help", says=("Usage:",))
    fresh.run("lmms-plugin", "doctor")


def main() -> int:
    """Check a fresh installation; 1 if it does not hold."""
    with tempfile.TemporaryDirectory(prefix="fresh-") as name:
        fresh = Fresh(Path(name))
        try:
            check(fresh)
        except (Broken, subprocess.CalledProcessError) as error:
            print(f"\nA fresh installation does not work: {error}", file=sys.stderr)
            try:
                differing = fresh.differing()
            except (OSError, subprocess.CalledProcessError):
                differing = ["nothing was installed"]
            print("\nDiffering from constraints.txt, with which it works:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in differing or ["nothing"]), file=sys.stderr)
            print(
                "Bound what broke in setup.cfg, with its reason, or mend the code; then `make lock`.", file=sys.stderr
            )
            return 1
        differing = fresh.differing()
    print(f"A fresh installation works; {len(differing)} distributions differ from constraints.txt.")
    print("".join(f"  {line}\n" for line in differing), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
