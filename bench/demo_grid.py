"""Quantizer × bits × component × calibration on the embedded demo: accuracy, calibration, size, and time.

    python -m bench.demo_grid --output demo_grid.jsonl [--methods rtn awq] [--limit N]
    python -m bench.demo_grid --output demo_grid.jsonl --table

Each cell is one run of lmms-eval's evaluator, in this process, on `shapes_rec` (clean) and
`shapes_shift_gaussian_noise_3`, in bfloat16. Cells are appended to the output as they finish; a rerun does only what is
missing. `speed` is that of the whole run (answered tokens per second) over that of the unquantized model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.evaluating import Evaluator
from bench.reporting import markdown
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.plans.plan import QuantSpec

TASKS = ("shapes_rec", "shapes_shift_gaussian_noise_3")
COMPONENTS = ("language", "vision", "connector", "all")
# Our own methods go through every component, the others through the language model.
EVERYWHERE = ("rtn", "hqq", "awq", "mbq", "gptq")
LANGUAGE_ONLY = ("ptqtp", "quanto", "bitsandbytes", "torchao", "autoround")
CALIBRATED = ("awq", "mbq", "gptq")
# The first is their default.
CALIBRATIONS = ("self", "noise", "demo")


@dataclass(frozen=True)
class Cell:
    """One configuration; `calibration` is None for methods without, `option` an argument of the method."""

    method: str
    bits: int
    component: str = "language"
    calibration: str | None = None
    option: str | None = None

    @property
    def arguments(self) -> str:
        """What `--model_args` says."""
        parts = ["pretrained=demo", "dtype=bfloat16", "batch_size=64"]
        if self.method != "none":
            parts += [f"{name}_bits={bits}" for name, bits in self._component_bits().items()]
        if self.calibration is not None:
            parts.append(f"calibration={self.calibration}")
        if self.option is not None:
            parts.append(self.option)
        return ",".join(parts)

    def _component_bits(self) -> dict[str, int]:
        parts = ("language", "vision", "connector")
        return {name: self.bits if self.component in (name, "all") else 16 for name in parts}


def cells(methods: Sequence[str] | None) -> Iterator[Cell]:
    """The grid, the baseline first; bits that a method does not do are left out."""
    yield Cell("none", 16)
    for method in (*EVERYWHERE, *LANGUAGE_ONLY):
        if methods is not None and method not in methods:
            continue
        default = CALIBRATIONS[0] if method in CALIBRATED else None
        for component in COMPONENTS if method in EVERYWHERE else ("language",):
            yield from (Cell(method, bits, component, default) for bits in (8, 4, 3, 2) if _able(method, bits))
        if method in CALIBRATED:
            yield from (Cell(method, bits, "language", source) for bits in (3, 2) for source in CALIBRATIONS[1:])
        if method == "awq":
            yield from (Cell(method, bits, "language", default, "clip=True") for bits in (4, 3, 2))


def _able(method: str, bits: int) -> bool:
    try:
        get(method).check_spec(QuantSpec(bits))
    except ValueError:
        return False
    return True


def run(cell: Cell, evaluator: Evaluator, limit: int | None) -> dict[str, Any]:
    """Evaluate one cell."""
    started = time.perf_counter()
    results = evaluator.run(f"quant_{cell.method}", cell.arguments, TASKS, limit=limit)
    scores = results["results"]
    totals = results["throughput"]
    row: dict[str, Any] = asdict(cell)
    for task, when in zip(TASKS, ("clean", "noise"), strict=True):
        row |= {f"{name} {when}": scores[task][f"{name},none"] for name in ("acc@0.5", "ece", "parse_rate")}
    return row | {
        "bits_per_weight": totals["avg_bits_per_weight"],
        "bytes_after": totals["avg_bytes_after"],
        "quantize_seconds": totals["avg_seconds"],
        "tokens_per_second": totals["avg_speed"],
        "seconds": time.perf_counter() - started,
        "limit": limit,
    }


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown, one line per cell."""
    baseline = next(row for row in rows if row["method"] == "none")
    columns = ("acc@0.5 clean", "ece clean", "parse_rate clean", "acc@0.5 noise", "ece noise")
    heads = ("method", "bits", "component", "calibration", *columns, "bpw", "MB", "quantize s", "speed")
    lines = []
    for row in rows:
        method = " ".join(filter(None, (row["method"], row["option"])))
        where = (str(row["bits"]), row["component"]) if row is not baseline else ("", "")
        names = (method, *where, row["calibration"] or "")
        numbers = (f"{row[column]:.3f}" for column in columns)
        rest = (
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes_after'] / 1e6:.2f}",
            f"{row['quantize_seconds']:.1f}",
            f"{row['tokens_per_second'] / baseline['tokens_per_second']:.2f}",
        )
        lines.append((*names, *numbers, *rest))
    return markdown(heads, lines)


def main() -> None:
    """Run what is missing, or print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--limit", type=int, help="expressions per task; only for trying things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()

    lines = options.output.read_text(encoding="utf-8").splitlines() if options.output.exists() else []
    rows = [json.loads(line) for line in lines]
    if options.table:
        print("\n".join(table(rows)))
        return
    evaluator = Evaluator(options.threads)
    done = {Cell(**{field.name: row[field.name] for field in fields(Cell)}) for row in rows}
    for cell in cells(options.methods):
        if cell in done:
            continue
        row = run(cell, evaluator, options.limit)
        with options.output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{cell}: {row['acc@0.5 clean']:.3f} / {row['acc@0.5 noise']:.3f}, {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
