"""Quantizer × bits × {clean, shifted} × confidence on the embedded demo: does the model know when it is wrong?

    python -m bench.demo_reliability --output demo_reliability [--shift gaussian_noise_5] [--limit N]
    python -m bench.demo_reliability --output demo_reliability --table

Each model is one run of lmms-eval's evaluator, in this process, on scenes to learn from (`shapes_rec_dev`), clean
scenes, and shifted ones; a rerun does only what is missing. Four confidences are compared on the same answers:

* `joint`: the probability of the whole answer (MaxProb);
* the token estimator with the highest AUROC on the scenes to learn from, and the same after Platt's calibration on
  them;
* `selector`: learned from the model's hidden states on those scenes.

Thresholds of effective reliability come from a fifth of the clean images, on which nothing is reported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.evaluating import Evaluator
from bench.reporting import markdown
from lmms_plugin.analysis import measure
from lmms_plugin.analysis.logs import LoggedRun, read_one
from lmms_plugin.analysis.records import TaskRecords
from lmms_plugin.confidence.estimators import ESTIMATORS, NEEDS
from lmms_plugin.metrics import auroc
from lmms_plugin.metrics.posthoc import Platt
from lmms_plugin.selector import features, training
from lmms_plugin.selector.network import Selector, SelectorSettings

DEV, CLEAN = "shapes_rec_dev", "shapes_rec"
METHODS = ("rtn", "hqq", "awq", "gptq")
BITS = (4, 3, 2)
COLUMNS = ("acc@0.5", "ece", "aurc", "coverage@0.05", "phi@10")
PER_TOKEN = tuple(name for name in ESTIMATORS if name not in NEEDS or NEEDS[name] == "digits")


def models() -> Iterator[tuple[str, str]]:
    """Name and arguments of every model, the unquantized one first."""
    common = "pretrained=demo,dtype=bfloat16,batch_size=64"
    yield "none", common
    for method in METHODS:
        yield from ((f"{method}-{bits}", f"{common},bits={bits}") for bits in BITS)


def best_estimator(dev: TaskRecords) -> str:
    """The token estimator that ranks answers best on the scenes to learn from."""
    ranks = {name: auroc(*_known(dev.confidence_by(name), dev.outcome)) for name in PER_TOKEN}
    return max(ranks, key=ranks.__getitem__)


def with_learned(run: LoggedRun, selector: Selector, store: features.Store, best: str) -> LoggedRun:
    """The run with the confidences that take training."""
    dev = run.tasks[DEV]
    known = ~np.isnan(dev.confidence_by(best))
    platt = Platt.fit(dev.confidence_by(best)[known], dev.outcome[known], dev.images[known].tolist(), split=DEV)
    tasks = {}
    for name, records in run.tasks.items():
        if name == DEV:
            continue
        confidence = records.confidence_by(best)
        there = ~np.isnan(confidence)
        calibrated = confidence.copy()
        calibrated[there] = platt.apply(confidence[there], records.images[there].tolist())
        learned = selector.confidence(training.features_of(records, store))
        # Compared are confidences of the same answers: those with a box.
        learned = np.where(there, learned, np.nan)
        added = {"selector": learned, f"{best}, Platt": calibrated}
        tasks[name] = replace(records, confidence={**records.confidence, **added})
    return replace(run, tasks=tasks)


def rows(name: str, folder: Path, store: features.Store, selector: Selector) -> Iterator[dict[str, Any]]:
    """The numbers of one model."""
    run = read_one(folder)
    best = best_estimator(run.tasks[DEV])
    run = with_learned(run, selector, store, best)
    for estimator in ("joint", best, f"{best}, Platt", "selector"):
        numbers = measure.measure(run, measure.MeasurementSettings(estimator))
        for task in sorted(run.tasks):
            of_task = {number.metric: number for number in numbers if number.task == task}
            found = {metric: _number(of_task.get(metric)) for metric in (*COLUMNS, "ece_floor")}
            yield {"model": name, "task": task, "confidence": estimator, **found}


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, one line per model, task and confidence."""
    heads = ("model", "data", "confidence", "acc@0.5", "ECE (floor)", "AURC", "C@5%", "Φ₁₀")
    lines = []
    for row in found:
        numbers = [_text(row[metric]) for metric in COLUMNS]
        numbers[1] += f" ({row['ece_floor'][0]:.3f})" if row["ece_floor"] else ""
        data = "clean" if row["task"] == CLEAN else "shifted"
        lines.append((row["model"], data, row["confidence"], *numbers))
    return markdown(heads, lines)


def main() -> None:
    """Run what is missing, and print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shift", default="gaussian_noise_5")
    parser.add_argument("--limit", type=int, help="expressions per task; only for trying things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    evaluator = None
    for name, arguments in models():
        folder, kept = options.output / name, options.output / "features" / name
        if not folder.exists():
            if options.table:
                continue
            evaluator = evaluator or Evaluator(options.threads)
            tasks = (DEV, CLEAN, f"shapes_shift_{options.shift}")
            method = name.partition("-")[0]
            asked = f"{arguments},features={kept}"
            evaluator.run(f"quant_{method}", asked, tasks, limit=options.limit, folder=folder)
        store = features.read(kept)
        selector = training.train(read_one(folder), store, SelectorSettings(), (DEV,))
        selector.save(options.output / f"{name}.safetensors")
        found += rows(name, folder, store, selector)
        print(name, flush=True)
    (options.output / "table.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n".join(table(found)))


def _known(confidence: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = ~np.isnan(confidence)
    return confidence[there], outcome[there]


def _number(number: measure.MetricValue | None) -> list[float] | None:
    return None if number is None else [number.value, number.low, number.high]


def _text(number: Sequence[float] | None) -> str:
    return "" if number is None else f"{number[0]:.3f} [{number[1]:.3f}, {number[2]:.3f}]"


if __name__ == "__main__":
    main()
