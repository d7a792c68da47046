"""Seconds and memory of `lmms-plugin report` on a large study, first and again, and of a plain loop over the same logs.

    python -m bench.report --cells 1000 --samples 5000 [--keep FOLDER] [--json FILE]

The study is synthetic, its files are not: logs are rows that the demo's tasks wrote, with ids, images, scores and
confidences of their own, and every cell has its `cell.json`, results file and account of layers. As many different logs
are made as `--distinct` says, and linked to from the cells: 1,000 different ones would be 23 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np

from bench import reporting
from lmms_plugin.utils import variables

METHODS = ("rtn", "hqq", "awq", "mbq", "gptq", "ptqtp", "quanto", "autoround")
BITS, GROUPS, SOURCES, SEEDS = (8, 4, 3, 2), (64, 128), ("noise", "self", "demo"), range(6)
TASKS = ("shapes_rec", "shapes_shift_gaussian_noise_3", "shapes_shift_gaussian_noise_5", "shapes_shift_fog_3")
IMAGES_PER_TASK = 320
LAYERS = 28


def main() -> None:
    """Make the study, report on it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, required=True, help="results file of a finished run of shapes_rec")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=5000, help="answers of each cell, over all its tasks")
    parser.add_argument("--distinct", type=int, default=40, help="different sets of logs")
    parser.add_argument("--keep", type=Path, help="folder for the study, kept; by default a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "study"
        if not folder.exists():
            make(folder, arguments.template, arguments.cells, arguments.samples, arguments.distinct)
        plain = plain_loop(folder, max(1, arguments.cells // 50)) * arguments.cells
        page, kept = Path(temporary) / "report.html", Path(temporary) / "kept"
        # The second report finds every cell measured.
        cases = [f"{arguments.cells} cells", f"{arguments.cells} cells, again"]
        rows = [{"case": case, **measure(folder, page, plain, kept)} for case in cases]
    print(reporting.machine())
    for line in reporting.markdown(list(rows[0]), [[_shown(value) for value in row.values()] for row in rows]):
        print(line)
    reporting.write(arguments.json, rows)


def make(folder: Path, template: Path, cells: int, samples: int, distinct: int) -> None:
    """Write a study of many cells into a new folder."""
    table = json.loads(template.read_text(encoding="utf-8"))
    log = template.with_name(template.name.replace("_results.json", "_samples_shapes_rec.jsonl"))
    lines = log.read_bytes().splitlines()
    made = folder / ".logs"
    made.mkdir(parents=True)
    logs = [_logs(made / str(k), lines, samples // len(TASKS), k) for k in range(min(distinct, cells))]
    for place, axes in zip(range(cells), _axes(), strict=False):
        _cell(
            folder / "cells" / f"cell-{place:04}", axes, table, made / str(place % len(logs)), logs[place % len(logs)]
        )


def measure(folder: Path, page: Path, plain: float, kept: Path) -> reporting.Row:
    """Seconds and memory of the report, beside the processor seconds of a plain loop.

    Args:
        folder: Study.
        page: Page to write.
        plain: Processor seconds of the loop.
        kept: Folder of measurements that an earlier report keeps.
    """
    command = [str(Path(sys.executable).with_name("lmms-plugin")), "report", str(folder), "-o", str(page)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, variables.CACHE: str(kept)})
    peak = 0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gb": peak / 1e9,
        "page_mb": page.stat().st_size / 1e6,
        "baseline": "json.loads of every row",
        "baseline_cpu_seconds": plain,
        "ratio": plain / cpu,
    }


def plain_loop(folder: Path, cells: int) -> float:
    """Processor seconds that parsing the logs of one cell takes, row by row, as the mean over some cells."""
    chosen = sorted((folder / "cells").iterdir())[:cells]
    start = time.process_time()
    for cell in chosen:
        for log in cell.glob("demo/*.jsonl"):
            with log.open("rb") as lines:
                for line in lines:
                    json.loads(line)
    return (time.process_time() - start) / len(chosen)


def _memory(pid: int) -> int:
    """Bytes in memory of a process and those it started; pages they share count in parts."""
    total = 0
    for one in (pid, *_children(pid)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            # It has just ended.
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _children(pid: int) -> list[int]:
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []
    return [one for child in found for one in (child, *_children(child))]


def _axes() -> Iterator[dict[str, Any]]:
    base = {"model": "demo", "components": "language"}
    nothing = {"group_size": None, "components": None, "calibration": None, "seed": None}
    yield {"model": "demo", "method": "none", "bits": 16, **nothing}
    names = ("method", "bits", "group_size", "calibration", "seed")
    # Seeds vary last, so that any number of cells has whole grids of the rest.
    for seed, source, group, bits, method in product(SEEDS, SOURCES, GROUPS, BITS, METHODS):
        yield base | dict(zip(names, (method, bits, group, source, seed), strict=True))


def _logs(folder: Path, lines: Sequence[bytes], samples: int, seed: int) -> dict[str, float]:
    """Write the logs of one run; returns task → mean score."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    means = {}
    for hard, task in enumerate(TASKS):
        scores = []
        with (folder / task).open("wb") as out:
            for number, line in zip(range(samples), cycle(lines), strict=False):
                row = json.loads(line)
                image = f"shapes_test_{number % IMAGES_PER_TASK:04}"
                name = f"{image}_{number // IMAGES_PER_TASK}/0"
                score = float(rng.beta(6, 1 + 0.6 * hard + 0.08 * seed))
                confidence = float(np.clip(rng.normal(0.5 + 0.4 * (score - 0.5), 0.12), 0, 1))
                _renamed(row, image, name, score, confidence)
                row["doc_id"] = number
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                scores.append(score)
        means[task] = float(np.mean(scores))
    return means


def _renamed(row: dict[str, Any], image: str, name: str, score: float, confidence: float) -> None:
    for entry in row.values():
        if isinstance(entry, dict) and "image" in entry:
            entry |= {"image": image, "id": name}
        elif isinstance(entry, list) and len(entry) == 4:
            entry[:] = [name, confidence, float(score >= 0.5), score]
    record = row["mean_iou"]
    record["score"] = score
    record["confidence"] = dict.fromkeys(record["confidence"], confidence)


def _cell(folder: Path, axes: dict[str, Any], table: dict[str, Any], logs: Path, means: dict[str, float]) -> None:
    run = folder / "demo"
    run.mkdir(parents=True)
    model = f"quant_{axes['method']}"
    versions = {"lmms-plugin": "0.1.0", "lmms_eval": "0.7.3"}
    told = {"id": folder.name, "model": model, "model_args": {"pretrained": "demo"}, "axes": axes, "limit": None}
    told |= {"command": ["lmms-eval", "--model", model], "versions": versions}
    (folder / "cell.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "quant_report.json").write_text(json.dumps(_account(axes)), encoding="utf-8")
    config = dict(table["configs"]["shapes_rec"])
    shifted = {task: task.removeprefix("shapes_shift_").rpartition("_") for task in TASKS[1:]}
    places = {task: {"shift": parts[0], "severity": int(parts[2])} for task, parts in shifted.items()}
    sizes = {}
    for task in TASKS:
        os.link(logs / task, run / f"20260101_000000_samples_{task}.jsonl")
        with (logs / task).open("rb") as lines:
            sizes[task] = sum(1 for _ in lines)
    results = table | {
        "results": {task: {"mean_iou,none": means[task]} for task in TASKS},
        "configs": {
            task: config | {"task": task, "metadata": {"version": 1.0} | places.get(task, {})} for task in TASKS
        },
        "n-samples": {task: {"original": size, "effective": size} for task, size in sizes.items()},
        "config": table["config"] | {"model": model, "model_args": "pretrained=demo", "limit": None},
    }
    (run / "20260101_000000_results.json").write_text(json.dumps(results), encoding="utf-8")


def _account(axes: dict[str, Any]) -> dict[str, Any]:
    bits = axes["bits"]
    layer = {"component": "language", "bits": bits, "output_error": None, "held_out_error": None}
    modules = [layer | {"name": f"layers.{k}", "relative_error": 2.0 ** (1 - bits)} for k in range(LAYERS)]
    sizes = {"bits_per_weight": bits + 0.25, "bits_per_model_weight": bits + 2.0, "bytes_after": 2e5 * (bits + 1)}
    return {**sizes, "seconds": 10.0, "modules": modules if bits < 16 else []}


def _shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
