"""Bits of vision tower × connector × language model on the embedded demo, for `lmms-plugin sensitivity`.

    python -m bench.component_grid --output component_grid [--method rtn] [--bits 2 3 4 8 16] [--limit N]
    lmms-plugin sensitivity component_grid --metric acc@0.5 --metric ece --figure component_grid/figures

Each combination is one run on `shapes_rec` with a folder of its own; a rerun does only what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

from bench.evaluating import Evaluator

COMPONENTS = ("vision", "connector", "language")
UNTOUCHED = 16


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4, 8, UNTOUCHED))
    parser.add_argument("--task", default="shapes_rec")
    parser.add_argument("--limit", type=int, help="expressions per run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(options.threads)
    for combination in itertools.product(options.bits, repeat=len(COMPONENTS)):
        folder = options.output / "-".join(map(str, combination))
        if folder.exists():
            continue
        bits = dict(zip(COMPONENTS, combination, strict=True))
        quantized = any(count != UNTOUCHED for count in combination)
        named = [f"{component}_bits={count}" for component, count in bits.items()] if quantized else []
        arguments = ",".join(["pretrained=demo", "batch_size=64", *named])
        model = f"quant_{options.method}" if quantized else "quant_none"
        started = time.perf_counter()
        results = evaluator.run(model, arguments, [options.task], limit=options.limit, folder=folder)
        score = results["results"][options.task]["acc@0.5,none"]
        print(f"{folder.name}: {score:.3f}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
