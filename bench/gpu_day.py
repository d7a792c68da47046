"""All that is to be measured on a large GPU, in one run that is cut off in time: `bench/gpu_day.sh` starts it.

    python -m bench.gpu_day --wheelhouse FOLDER --output FOLDER [--budget 540] [--parts NAME ...] [--dry-run]

The machine has torch with CUDA, and no network. Distributions that it lacks are installed from the wheelhouse into a
folder of their own, which goes with the run; versions that are there already stay. Then the parts run one after
another, the most important first, each in a process of its own with a limit: one that fails, or that is cut off, leaves
the rows that it has written, and the others go on. After each, `gpu_day.json` and `gpu_day.txt` (the table) are written
anew. `--dry-run` takes a tiny model on the CPU through the same parts.

This module imports nothing but the standard library: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0
NEEDED = "needed.txt"
"""File in a wheelhouse that names every distribution that the parts need, those with a wheel and the others."""
PACKAGE = "lmms-plugin"
LAST = 1500
"""Characters of what a part said last that are kept where it was not done."""


class Part(NamedTuple):
    """Something to be measured.

    Attributes:
        name: Name.
        command: Arguments of Python.
        limit: Seconds that it may take.
    """

    name: str
    command: tuple[str, ...]
    limit: float


class Outcome(NamedTuple):
    """What became of a part.

    Attributes:
        name: Name of the part.
        status: "done", or why it is not.
        seconds: Seconds that it took.
        rows: Rows that it wrote.
        said: What it said last, if it was not done.
    """

    name: str
    status: str
    seconds: float
    rows: list[dict[str, Any]]
    said: str = ""


LIMITS = {
    "tests": 100.0,
    "throughput": 170.0,
    "answering": 120.0,
    "quantize": 120.0,
    "decode": 60.0,
    "static_cache": 90.0,
    "two_processes": 90.0,
}
"""Part → seconds that it may take; the most important first."""


def parts(work: Path, device: str, shape: str, small: bool) -> list[Part]:
    """All parts, in the order of `LIMITS`.

    Args:
        work: Folder for what they write; `{name}.json` is what is read of each.
        device: Device of torch.
        shape: Name in bench/shapes.py.
        small: Whether as little as possible is measured, however long that takes: the machine may be busy.
    """
    at = ("--device", device, "--shape", shape)
    arguments = _small(at) if small else _whole(at)
    commands = {"tests": ("-P", "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={work / 'tests.xml'}", *gpu_tests())}
    for name, (bench, *more) in arguments.items():
        checkpoint = {"decode": (), "quantize": ("--written", str(work / "checkpoint"))}
        holds = checkpoint.get(name, ("--checkpoint", str(work / "checkpoint")))
        commands[name] = ("-m", f"bench.{bench}", *more, *holds, "--json", str(work / f"{name}.json"))
    return [Part(name, commands[name], BUDGET * limit if small else limit) for name, limit in LIMITS.items()]


def _whole(at: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Part → benchmark and its arguments."""
    throughput = ("throughput", *at, "--repeats", "1", "--ways")
    images = ("--images", "2", "--auto-images", "32")
    return {
        "throughput": (*throughput, "shared", "auto", "lmms_eval", *images, "--expressions", "7", "14", "1", "3"),
        "answering": ("answering", *at, "--images", "16"),
        "quantize": ("quantize", *at, "--methods", "rtn", "hqq", "awq", "gptq"),
        "decode": ("decode", *at, "--batch", "1", "8", "--bits", "8", "4", "3", "2"),
        "static_cache": (*throughput, "static", "plain", "--images", "1", "--expressions", "4"),
        "two_processes": ("two_processes", *at, "--images", "16"),
    }


def _small(at: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The same with as little work as possible."""
    size = ("--size", "160", "120")
    throughput = ("throughput", *at, *size, "--repeats", "1", "--images", "1", "--ways")
    return {
        "throughput": (*throughput, "shared", "auto", "lmms_eval", "--auto-images", "2", "--expressions", "2"),
        "answering": ("answering", *at, *size, "--images", "2", "--bits", "16", "4"),
        "quantize": ("quantize", *at, "--methods", "rtn"),
        "decode": ("decode", *at, "--batch", "1", "8", "--bits", "4", "--repeats", "1"),
        "static_cache": (*throughput, "static", "plain", "--expressions", "1"),
        "two_processes": ("two_processes", *at, *size, "--images", "2"),
    }


def gpu_tests() -> list[str]:
    """The files with tests that are marked gpu, from the top of the checkout."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lacking(needed: Iterable[str], site: Path | None = None) -> list[str]:
    """Those of the distributions that are not installed, here or in a further folder."""
    paths = [*([str(site)] if site else []), *sys.path]
    there = {canonical(one.name) for one in importlib.metadata.distributions(path=paths)}
    return [name for name in needed if canonical(name) not in there]


def install(wheelhouse: Path, site: Path) -> str:
    """Install what is lacking from a wheelhouse; return what it lacks all the same, in one line, or "".

    Raises:
        FileNotFoundError: The folder is no wheelhouse.
    """
    listing = wheelhouse / NEEDED
    if not listing.is_file():
        raise FileNotFoundError(f"{wheelhouse}: expected a folder that bench/gpu_day_wheelhouse.py wrote, no {NEEDED}")
    needed = listing.read_text(encoding="utf-8").split()
    wheels = {canonical(wheel.name.split("-")[0]): wheel for wheel in sorted(wheelhouse.glob("*.whl"))}
    # The package is that of the checkout, whatever is installed.
    wanted = {name for name in map(canonical, lacking(needed)) if name in wheels} | {PACKAGE}
    found = [str(wheels[name]) for name in sorted(wanted) if name in wheels]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheelhouse)]
    command += ["--no-deps", "--no-compile", "--target", str(site), *found]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    missing = lacking(needed, site)
    told = f"missing, and not in the wheelhouse: {', '.join(missing)}" if missing else ""
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        told = "; ".join(filter(None, (f"pip failed: {reason}", told)))
    return told


def run(part: Part, work: Path, left: float, environment: Mapping[str, str]) -> Outcome:
    """Run a part within its limit and what is left of the budget."""
    if left <= 0:
        return Outcome(part.name, "not begun: the budget is spent", 0.0, [])
    log = work / f"{part.name}.log"
    start = time.monotonic()
    limit = min(part.limit, left)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            # 5 is pytest's for nothing to run.
            status = "done" if code in (0, *((5,) if part.name == "tests" else ())) else f"ended with status {code}"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    said = "" if status == "done" else log.read_text(encoding="utf-8", errors="replace")[-LAST:]
    return Outcome(part.name, status, time.monotonic() - start, rows_of(work, part.name), said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows_of(work: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows that a part left behind; empty where it left none that can be read."""
    try:
        if name == "tests":
            return [_counts(work / "tests.xml")]
        rows: list[dict[str, Any]] = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, ElementTree.ParseError):
        # A part that was cut off may have written nothing, or half of it.
        return []
    return rows


def _counts(file: Path) -> dict[str, Any]:
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    failed = [case.get("name") for case in ElementTree.parse(file).getroot().iter("testcase") if len(case)]
    return {"case": "tests marked gpu", "ratio": None, **counts, "not_passed": failed}


def table(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The whole run as text: a line per part and a line per row, numbers that are not lists."""
    lines = [f"{key}: {value}" for key, value in facts.items()]
    for outcome in outcomes:
        lines.append(f"\n{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s")
        for row in outcome.rows:
            ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3g}"
            kept = {key: value for key, value in row.items() if key not in ("case", "ratio")}
            numbers = [f"{key} {value:.4g}" for key, value in kept.items() if isinstance(value, int | float)]
            lines.append(f"  {row['case']:<28}{ratio:>8}  {', '.join(numbers)}")
    return "\n".join(lines) + "\n"


def publish(output: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write JSON and table, whole or not at all."""
    content = {**facts, "parts": [outcome._asdict() for outcome in outcomes]}
    for name, text in (("gpu_day.json", json.dumps(content, indent=1)), ("gpu_day.txt", table(facts, outcomes))):
        unfinished = output / f".{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(output / name)


def describe(environment: Mapping[str, str]) -> dict[str, Any]:
    """Versions, and the device as torch names it."""
    code = (
        "import json, torch, transformers; there = torch.cuda.is_available(); print(json.dumps({'torch':"
        " torch.__version__, 'transformers': transformers.__version__, 'device': torch.cuda.get_device_name() if there"
        " else 'cpu', 'device_bytes': torch.cuda.mem_get_info()[1] if there else None}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        return {"torch": f"cannot be imported: {(done.stderr.strip().splitlines() or [''])[-1]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheelhouse", type=Path, help="folder of wheels; without it nothing is installed")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all, the installation among them")
    parser.add_argument("--parts", nargs="+", help="names of parts, in the place of all")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, run the parts, and write after each; return 1 if one of them is not done."""
    start = time.monotonic()
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    device, shape = ("cpu", "tiny") if options.dry_run else ("cuda", "3b")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        listed = parts(work, device, shape, options.dry_run)
        if strange := set(options.parts or ()) - {part.name for part in listed}:
            sys.exit(f"--parts: expected some of {', '.join(part.name for part in listed)}; got {', '.join(strange)}")
        told = install(options.wheelhouse, work / "site") if options.wheelhouse else ""
        folders = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
        facts = {**describe(environment), "dry_run": options.dry_run, "missing": told or "nothing"}
        print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
        outcomes: list[Outcome] = []
        publish(options.output, facts, outcomes)
        for part in listed:
            if options.parts and part.name not in options.parts:
                continue
            left = options.budget - (time.monotonic() - start)
            outcomes.append(run(part, work, left, environment))
            publish(options.output, facts, outcomes)
            print(f"{part.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    print((options.output / "gpu_day.txt").read_text(encoding="utf-8"))
    print((options.output / "gpu_day.json").read_text(encoding="utf-8"))
    return 0 if all(outcome.status == "done" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
