"""What every benchmark prints and writes: the machine, medians, and one row per case with a ratio."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
"""One case: at least its name (`case`) and `ratio`, baseline over ours; above 1 means that ours is faster or smaller.
`ratio` is None where there is nothing to compare with."""


def machine() -> str:
    """Processor or accelerator, cores, load, and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else names[0]
    return (
        f"{device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of each call, after one of each that does not count.

    The calls take turns, so that a disturbance of the machine meets all of them. With ``clock=time.process_time`` it is
    the processor's time that counts, which other processes disturb least.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def markdown(heads: Sequence[str], cells: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table, line by line."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(row)} |" for row in cells)


def write(path: Path | None, rows: Sequence[Row]) -> None:
    """Write rows as a JSON list, if there is a path; whoever reads it meanwhile finds the former rows."""
    if path is not None:
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_text(json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
