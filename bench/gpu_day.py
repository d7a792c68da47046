"""All that is to be measured on a large GPU, in one run that is cut off in time: `bench/gpu_day.sh` starts it.

    python -m bench.gpu_day --wheelhouse FOLDER --output FOLDER [--budget 540] [--parts NAME ...] [--dry-run]

The machine has torch with CUDA, and no network. Distributions that it lacks are installed from the wheelhouse into a
folder of their own, which goes with the run; versions that are there already stay. Then the parts run one after
another, the most important first, each in a process of its own with a limit: one that fails, or that is cut off, leaves
the rows that it has written, and the others go on. Every few seconds `gpu_day.json`, `gpu_day.txt` (the table) and
`gpu_day.log` (what the parts said) are written anew, so that little is lost if all of it is cut off. `--dry-run` takes
a tiny model on the CPU through the same parts.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0
NEEDED = "needed.txt"
"""File in a wheelhouse that names every distribution that the parts need, those with a wheel and the others."""
PACKAGE = "lmms-plugin"
LAST = 1500
"""Characters of what a part said last that are kept where it was not done."""
LOOK = 5.0
"""Seconds between two looks at the rows of a part that runs."""
LOG = 200_000
"""Characters of what a part said last that are written to the log."""
SLOWEST = "test_libraries.py"
"""File whose tests have a library compile kernels: last, so that it keeps no others from running."""


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
        status: "done", "running", or why it is not done.
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
    "answering": 110.0,
    "quantize": 80.0,
    "gptq": 50.0,
    "decode": 50.0,
    "static_cache": 90.0,
    "two_processes": 90.0,
}
"""Part → seconds that it may take; the most important first."""

RATIOS = {
    "throughput": "time of the other way over ours; floor: share of our time that the arithmetic takes at least",
    "answering": "tokens per second over those of 16 bits",
    "quantize": "bytes of the dense model over the most anonymous memory of the process",
    "gptq": "as of quantize",
    "decode": "time of 16 bits over that of packed weights",
    "static_cache": "time of the plain way over that with a static cache",
    "two_processes": "expressions per second of both together over those of one alone",
}
"""Part → what the numbers in the table's second column are."""


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
    pytest = ("-P", "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu")
    # A file that cannot be imported there is no reason not to run the others.
    pytest += ("--continue-on-collection-errors",)
    commands = {"tests": (*pytest, f"--junitxml={work / 'tests.xml'}", *gpu_tests())}
    for name, (bench, *more) in arguments.items():
        checkpoint = {
            "decode": (),
            "quantize": ("--written", str(work / "checkpoint")),
            "gptq": ("--written", str(work / "few_blocks")),
        }
        holds = checkpoint.get(name, ("--checkpoint", str(work / "checkpoint")))
        commands[name] = ("-m", f"bench.{bench}", *more, *holds, "--json", str(work / f"{name}.json"))
    return [Part(name, commands[name], BUDGET * limit if small else limit) for name, limit in LIMITS.items()]


def _whole(at: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Part → benchmark and its arguments."""
    throughput = ("throughput", *at, "--repeats", "1", "--ways")
    images = ("--images", "2", "--auto-images", "32")
    return {
        # What takes longest comes last: half of the time goes to 14 questions.
        "throughput": (*throughput, "shared", "auto", "lmms_eval", *images, "--expressions", "7", "1", "3", "14"),
        "answering": ("answering", *at, "--images", "16", "--bits", "16", "4", "8", "3", "2"),
        "quantize": ("quantize", *at, "--methods", "rtn", "awq", "hqq"),
        # Each column is a handful of small operations: of all blocks it would take more than there is time.
        "gptq": ("quantize", *at, "--methods", "gptq", "--layers", "4"),
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
        "gptq": ("quantize", *at, "--methods", "gptq", "--layers", "1"),
        "decode": ("decode", *at, "--batch", "1", "8", "--bits", "4", "--repeats", "1"),
        "static_cache": (*throughput, "static", "plain", "--expressions", "1"),
        "two_processes": ("two_processes", *at, *size, "--images", "2"),
    }


def gpu_tests() -> list[str]:
    """The files with tests that are marked gpu, from the top of the checkout; `SLOWEST` is the last one."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda file: (file.name == SLOWEST, file))
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
    reason = _pip(found, site)
    if reason:
        # One wheel of another Python keeps all from being installed: then each by itself.
        reasons = {wheel: why for wheel in found if (why := _pip([wheel], site))}
        reason = f"pip failed for {len(reasons)} of {len(found)} wheels: {reason}" if reasons else ""
    if others := [str(wheels[name]) for name in sorted(unfit(site)) if name in wheels]:
        reason = "; ".join(filter(None, (reason, _pip(others, site))))
    missing = lacking(needed, site)
    told = f"missing, and not in the wheelhouse: {', '.join(missing)}" if missing else ""
    return "; ".join(filter(None, (reason, told, told_unfit(site))))


def _pip(wheels: Sequence[str], site: Path) -> str:
    """Install wheels into a folder; return why that failed, in one line, or ""."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--target", str(site), *wheels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return (said or ["no reason given"])[-1] if done.returncode else ""


def unfit(site: Path) -> dict[str, str]:
    """Return name → version and what the package admits, where these differ; empty where nothing reads requirements."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return {}
    # What comes first on the path is what is imported: it is seen last here.
    paths = [*reversed(sys.path), str(site)]
    there = {canonical(one.name): one for one in importlib.metadata.distributions(path=paths)}
    package = there.get(PACKAGE)
    required = [Requirement(line) for line in (package.requires or ())] if package else []
    return {
        canonical(one.name): f"{there[canonical(one.name)].version} (asked for: {one.specifier})"
        for one in required
        if (one.marker is None or one.marker.evaluate({"extra": ""}))
        and canonical(one.name) in there
        and not one.specifier.contains(there[canonical(one.name)].version, prereleases=True)
    }


def told_unfit(site: Path) -> str:
    """Return in one line what `unfit` finds, or ""."""
    found = [f"{name} {version}" for name, version in unfit(site).items()]
    return f"other versions than asked for: {', '.join(found)}" if found else ""


def run(
    part: Part,
    work: Path,
    left: float,
    environment: Mapping[str, str],
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Run a part within its limit and what is left of the budget.

    Args:
        part: Part.
        work: Folder of its rows and of what it says.
        left: Seconds that are left.
        environment: Environment variables.
        tell: What to do with the rows so far, every `LOOK` seconds.
    """
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
            while (code := _status(process, min(LOOK, start + limit - time.monotonic()))) is None:
                if time.monotonic() - start >= limit:
                    break
                tell(Outcome(part.name, "running", time.monotonic() - start, rows_of(work, part.name)))
        finally:
            _end(process)
    # 5 is pytest's for nothing to run.
    done = code == 0 or (part.name, code) == ("tests", 5)
    status = "done" if done else f"cut off after {limit:.0f} s" if code is None else f"ended with status {code}"
    said = "" if done else said_in(log)[-LAST:]
    return Outcome(part.name, status, time.monotonic() - start, rows_of(work, part.name), said)


def said_in(log: Path) -> str:
    """Return what a part said, without the states of progress bars that were overwritten."""
    # Not as text, of which every "\r" would be the end of a line.
    lines = log.read_bytes().decode(errors="replace").split("\n")
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines)


def _status(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return a process's exit status; None if it still runs after so many seconds."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows_of(work: Path, name: str) -> list[dict[str, Any]]:
    """Return the rows that a part left behind; empty where it left none that can be read."""
    try:
        if name == "tests":
            report = work / "tests.xml"
            return [_counts(report) if report.exists() else _counts_so_far(work / "tests.log")]
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
    told: dict[str, dict[str, str]] = {"failed": {}, "skipped_for": {}}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                kind = "skipped_for" if child.tag == "skipped" else "failed"
                told[kind][case.get("name", "?")] = (child.get("message") or "").strip()[:300]
    return {"case": "tests marked gpu", "ratio": None, **counts, **told}


def _counts_so_far(log: Path) -> dict[str, Any]:
    """Count what pytest has said of single tests: of a run that was cut off there is no report."""
    said = re.findall(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", said_in(log), re.MULTILINE)
    by_kind = {kind: [name.split("::")[-1] for name, found in said if found == kind] for _, kind in said}
    counts = {"tests": len(said), "failures": len(by_kind.get("FAILED", ())), "errors": len(by_kind.get("ERROR", ()))}
    skipped = len(by_kind.get("SKIPPED", ()))
    failed = dict.fromkeys([*by_kind.get("FAILED", ()), *by_kind.get("ERROR", ())], "see gpu_day.log")
    return {"case": "tests marked gpu, so far", "ratio": None, **counts, "skipped": skipped, "failed": failed}


def table(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """The whole run as text: a line per part and a line per row, numbers that are not lists."""
    lines = [f"{key}: {value}" for key, value in facts.items()]
    for outcome in outcomes:
        lines.append(f"\n{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s")
        if outcome.rows and outcome.name in RATIOS:
            lines.append(f"  (ratio: {RATIOS[outcome.name]})")
        for row in outcome.rows:
            ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3g}"
            kept = {key: value for key, value in row.items() if key not in ("case", "ratio")}
            numbers = [f"{key} {_shown(value)}" for key, value in kept.items() if isinstance(value, int | float)]
            lines.append(f"  {row['case']:<28}{ratio:>8}  {', '.join(numbers)}")
            for kind in ("failed", "skipped_for"):
                named = row.get(kind, {}).items()
                lines += [f"    {kind.split('_')[0]}: {name}: {(why.splitlines() or [''])[0]}" for name, why in named]
        lines += [f"    | {line}" for line in outcome.said.strip().splitlines()[-8:]]
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    """A number for the table; bytes and the like without an exponent."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def publish(output: Path, work: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write JSON, table and log, each whole or not at all."""
    content = {**facts, "parts": [outcome._asdict() for outcome in outcomes]}
    logs = [file for file in (work / f"{outcome.name}.log" for outcome in outcomes) if file.exists()]
    files = {
        "gpu_day.json": json.dumps(content, indent=1),
        "gpu_day.txt": table(facts, outcomes),
        "gpu_day.log": "".join(f"=== {file.stem}\n{said_in(file)[-LOG:]}\n" for file in logs),
    }
    for name, text in files.items():
        unfinished = output / f".{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(output / name)


def describe(environment: Mapping[str, str]) -> dict[str, Any]:
    """Versions, and the device as torch names it."""
    code = (
        "import json, platform, shutil, torch, transformers; there = torch.cuda.is_available(); print(json.dumps({"
        "'python': platform.python_version(), 'torch': torch.__version__, 'transformers': transformers.__version__,"
        " 'compilers': [name for name in ('gcc', 'g++', 'nvcc', 'ninja') if shutil.which(name)], 'device':"
        " torch.cuda.get_device_name() if there else 'cpu', 'device_bytes': torch.cuda.mem_get_info()[1] if there"
        " else None}))"
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
        told = install(options.wheelhouse, work / "site") if options.wheelhouse else told_unfit(work / "site")
        folders = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Logs are no terminals: a state of a progress bar now and then.
        offline = {"HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "10"}
        environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(folders)}
        facts = {**describe(environment), "dry_run": options.dry_run, "missing": told or "nothing"}
        print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
        if device == "cuda" and facts.get("device_bytes") is None:
            sys.exit("torch finds no CUDA device here: see nvidia-smi and CUDA_VISIBLE_DEVICES; --dry-run needs none")
        wanted = [part for part in listed if not options.parts or part.name in options.parts]
        outcomes = run_all(wanted, work, options.output, facts, environment, start + options.budget)
    # The table last: where only the end of what was printed is kept, it is this.
    print(json.dumps([outcome._asdict() for outcome in outcomes]))
    print((options.output / "gpu_day.txt").read_text(encoding="utf-8"))
    undone = [outcome.name for outcome in outcomes if outcome.status != "done"]
    if undone:
        print(f"Not done: {', '.join(undone)}. In another run: --parts {' '.join(undone)}", flush=True)
    return 1 if undone else 0


def run_all(
    wanted: Sequence[Part],
    work: Path,
    output: Path,
    facts: Mapping[str, Any],
    environment: Mapping[str, str],
    end: float,
) -> list[Outcome]:
    """Run parts until a moment of the monotonic clock, and publish what there is after each and meanwhile."""
    outcomes: list[Outcome] = []
    publish(output, work, facts, outcomes)
    for part in wanted:
        done = tuple(outcomes)
        left = end - time.monotonic()
        outcomes.append(
            run(part, work, left, environment, lambda one, done=done: publish(output, work, facts, (*done, one)))
        )
        publish(output, work, facts, outcomes)
        print(f"{part.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _stop(*_: object) -> None:
    """End as after an error, so that nothing runs on that was started."""
    sys.exit("gpu_day was ended; what it had measured is in its output")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
