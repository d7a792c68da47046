"""Write the wheelhouse that `bench/gpu_day.sh` installs from, on a machine with network.

    python -m bench.gpu_day_wheelhouse FOLDER [--present FILE] [--python 3.12] [--most-mb 60]

It is run in an environment that has everything (`make test`'s): what is needed, in which versions, is read from what is
installed there, so that it is what constraints.txt locks. Left out are what a machine with torch and transformers has
(`HAS`, with all that these require; or the names in a file, one to a word: `pip list --format=freeze | cut -d= -f1`),
and `UNUSED`, which lmms-eval requires and no part imports. Whether its wheels fit into the bound is told by the exit
status; `needed.txt` names everything that is needed, for the machine to say what it lacks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from bench.gpu_day import NEEDED, PACKAGE, ROOT, canonical

ROOTS = (PACKAGE, "decord", "qwen-vl-utils", "psutil", "pytest", "hypothesis", "torchao")
"""bitsandbytes, which some tests ask for, is larger than all of these together; without it they fail and are named."""
HAS = ("torch", "torchvision", "transformers", "accelerate", "numpy", "scipy", "pandas", "pyarrow", "pillow")
HAS += (
    "scikit-learn",
    "matplotlib",
    "opencv-python-headless",
    "sentencepiece",
    "sentence-transformers",
    "pydantic-core",
)
NARROW = ("filelock",)
"""Taken along though the machine has them: of some versions that are in use the package admits none."""
UNUSED = ("av", "pycocoevalcap", "wandb", "ruff", "pre-commit", "yt-dlp", "hf-transfer", "sentry-sdk", "gitpython")
UNUSED += ("zstandard", "numexpr")
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5))
PLATFORMS += ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")
MB = 1e6


def closure(roots: Iterable[str], python: str, without: Collection[str] = ()) -> dict[str, str]:
    """Return name → version of distributions and all that they require, as installed here.

    Args:
        roots: Names.
        python: Version of Python for which requirements hold, e.g. ``3.12``.
        without: Canonical names that are left out, with what only they require.
    """
    place = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    waiting = [canonical(root) for root in roots]
    while waiting:
        name = waiting.pop()
        if name in found or name in without:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # Required for another machine than this one, or an oddity of this environment: the run says if it lacks it.
            continue
        found[name] = distribution.version
        for line in distribution.requires or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate(place):
                waiting.append(canonical(required.name))
    return found


def is_pure(name: str) -> bool:
    """Whether an installed distribution is Python alone, for any machine and version."""
    return "py3-none-any" in (importlib.metadata.distribution(name).read_text("WHEEL") or "")


def pip(*arguments: str) -> None:
    """Run pip, or end with what it says."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} failed: {done.stderr.strip()[-2000:]}")


def fetch(folder: Path, wanted: dict[str, str], python: str) -> None:
    """Fetch a wheel of every distribution; those that are published as source alone are built."""
    pure = [f"{name}=={version}" for name, version in wanted.items() if is_pure(name)]
    compiled = [f"{name}=={version}" for name, version in wanted.items() if not is_pure(name)]
    common = ("--quiet", "--no-deps")
    if pure:
        pip("wheel", *common, "--wheel-dir", str(folder), *pure)
    if compiled:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
        pip("download", *common, *target, "--dest", str(folder), *compiled)


def build(folder: Path) -> None:
    """Build the wheel of this checkout, from a copy: a build leaves folders behind that the next would take over."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "checkout"
        kept = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "demo_output", "site", "dist")
        shutil.copytree(ROOT, copy, ignore=kept)
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the wheelhouse and print the sizes; end with status 1 if they are above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--present", type=Path, help="file of names that the machine has, in the place of the default")
    parser.add_argument("--python", default="3.12", help="its version of Python")
    parser.add_argument("--most-mb", type=float, default=60.0)
    options = parser.parse_args(arguments)
    unused = set(map(canonical, UNUSED))
    # What torch requires came with the torch that is there, and is another set for another version of CUDA.
    needed = closure(ROOTS, options.python, unused | (closure(["torch"], options.python).keys() - {"torch", *NARROW}))
    named = options.present.read_text(encoding="utf-8").split() if options.present else closure(HAS, options.python)
    there = {*map(canonical, named)} - {*NARROW}
    wanted = {name: version for name, version in needed.items() if name not in {*there, PACKAGE}}
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("*.whl"):
        old.unlink()
    build(options.folder)
    fetch(options.folder, wanted, options.python)
    (options.folder / NEEDED).write_text("\n".join(sorted(needed)) + "\n", encoding="utf-8")
    sizes = {wheel.name: wheel.stat().st_size / MB for wheel in options.folder.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        print(f"{size:8.2f} MB  {name}")
    whole = sum(sizes.values())
    print(f"{whole:8.2f} MB  in {len(sizes)} wheels, of at most {options.most_mb:g}")
    if whole > options.most_mb:
        sys.exit(1)


if __name__ == "__main__":
    main()
