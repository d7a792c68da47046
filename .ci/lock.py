"""Write constraints.txt: every distribution that pip installs for this package and all its extras.

    make lock

pip itself resolves, in an empty environment, what `pip install ".[every extra]"` takes today. Nothing is installed.
"""

import configparser
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
# Installed without their dependencies, see there.
ALONE = ROOT / "tests" / "requirements.txt"


# It asks for a GPU when it is imported, so that tests are run without it.
NOT_LOCKED = {"gemlite"}


def extras() -> list[str]:
    """Names of all extras that are locked."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return sorted(set(setup["options.extras_require"]) - NOT_LOCKED)


def resolve(python: Path, folder: Path, *arguments: str) -> dict[str, str]:
    """Name and version of everything that pip would install."""
    report = folder / "report.json"
    pip = [str(python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    subprocess.run([*pip, *arguments], check=True)
    found = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    # A local version (2.15.0+cpu) is one machine's build of a public one.
    return {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"].partition("+")[0] for one in found}


def main() -> None:
    """Resolve and write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = folder / "venv" / "bin" / "python"
        held = resolve(python, folder, f"{ROOT}[{','.join(extras())}]")
        held |= resolve(python, folder, "--no-deps", "--requirement", str(ALONE))
    held.pop("lmms-plugin")
    python_version = ".".join(platform.python_version_tuple()[:2])
    head = f"""\
# Made by `make lock`, never by hand: all that pip installs for this package and its extras on Python {python_version},
# {platform.system()} {platform.machine()}. `pip install -c constraints.txt .` gives the environment that was tested.
"""
    LOCK.write_text(head + "".join(f"{name}=={held[name]}\n" for name in sorted(held)), encoding="utf-8")
    print(f"{LOCK.name}: {len(held)} distributions")


if __name__ == "__main__":
    main()
