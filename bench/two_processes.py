"""Two processes that share a device, against one that has it for itself.

    python -m bench.two_processes [--device cuda] [--shape 3b] [--checkpoint FOLDER] [--expressions 7] [--json FILE]

Each runs `bench.throughput --ways auto`, whose batches grow until memory runs out, and answers all its questions or
fails. `ratio` is the rate of both together over that of one alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.reporting import Row, write


def started(options: argparse.Namespace, file: Path) -> subprocess.Popen[bytes]:
    """Start a process that writes its rows to a file."""
    command = [sys.executable, "-m", "bench.throughput", "--ways", "auto", "--repeats", "1", "--json", str(file)]
    command += ["--expressions", str(options.expressions), "--auto-images", str(options.images)]
    command += ["--images", "1", "--device", options.device, "--shape", options.shape]
    command += ["--checkpoint", str(options.checkpoint), "--size", *map(str, options.size)]
    # Not a pipe, which would stop the one that is not being read once it is full.
    with file.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)


def rates(options: argparse.Namespace, folder: Path, processes: int) -> list[float]:
    """Expressions per second of each of several processes at once.

    Raises:
        RuntimeError: One of them failed; the message is what it said last.
    """
    files = [folder / f"{processes}-{number}.json" for number in range(processes)]
    running = [started(options, file) for file in files]
    ended = [process.wait() for process in running]
    for file, status in zip(files, ended, strict=True):
        if status:
            said = file.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"one of {processes} processes ended with {status}:\n{said[-2000:]}")
    return [json.loads(file.read_text())[0]["expressions_per_s"] for file in files]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one, then two, and print and write the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="small")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with a checkpoint of that shape")
    parser.add_argument("--expressions", type=int, default=7)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        alone = rates(options, Path(folder), 1)
        both = rates(options, Path(folder), 2)
    (by_itself,), together = alone, sum(both)
    row: Row = {"case": "two processes", "ratio": together / by_itself, "expressions_per_s": together}
    row |= {"alone_per_s": by_itself, "each_per_s": both}
    print(row)
    write(options.json, [row])


if __name__ == "__main__":
    main()
