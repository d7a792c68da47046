"""Tokens per second of whole quantized models, by bits and by how weights are stored while answering.

    python -m bench.answering [--bits 16 8 4 3 2] [--storage packed dense] [--shape 3b --device cuda] [--json FILE]

Each model is loaded by itself, quantized by round to nearest (16 bits: not at all), and answers the documents of
`bench.throughput`, 24 tokens each, with `batch_size=auto`; the first pass does not count. `ratio` is its rate over that
of 16 bits. Where this version of the package offers no choice of storage, weights are as it stores them.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bench.decode import clock_of
from bench.reporting import Row, machine, write
from bench.shapes import SHAPES, written
from bench.throughput import ANSWER_TOKENS, documents, ours, run
from lmms_plugin.arguments import ModelArguments

UNQUANTIZED = 16


def models(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of every model with what loads it."""
    from lmms_plugin.vlm.wrapper import model_class

    offered = "storage" in {one.name for one in fields(ModelArguments)}
    given = {"device": options.device, "dtype": options.dtype, "batch_size": "auto"}
    for bits in options.bits:
        if bits == UNQUANTIZED:
            yield f"{bits} bits", lambda: ours(folder, **given)
            continue
        for storage in options.storage if offered else [None]:
            more = {"bits": bits, "group_size": options.group_size} | ({"storage": storage} if storage else {})
            quantized = model_class("rtn")
            yield (
                f"{bits} bits{f' {storage}' if storage else ''}",
                lambda quantized=quantized, more=more: quantized(pretrained=str(folder), **given, **more),
            )


def measure(make: Callable[[], Any], options: argparse.Namespace) -> Row:
    """Load a model, let it answer, and return rate and memory."""
    clock = clock_of(options.device)
    start = time.perf_counter()
    model = make()
    loading = time.perf_counter() - start
    docs = documents(options.images, options.expressions, tuple(options.size))
    run(model, docs, clock)
    seconds, peak, _ = run(model, docs, clock)
    held = torch.cuda.memory_allocated() if options.device.startswith("cuda") else None
    tokens = len(docs) * ANSWER_TOKENS
    return {"tokens_per_s": tokens / seconds, "loading_s": loading, "device_bytes": held, "peak_bytes": peak}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per model, and write all of them after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4, 3, 2])
    parser.add_argument("--storage", nargs="+", default=["packed", "dense"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder with a checkpoint of that shape; written if it is empty"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--expressions", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    print(machine())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = written(options.checkpoint or Path(temporary), SHAPES[options.shape], options.device)
        for name, make in models(options, folder):
            row = {"case": name, "ratio": None, **measure(make, options)}
            gc.collect()
            row["ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"] if rows else 1.0
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write(options.json, rows)


if __name__ == "__main__":
    main()
