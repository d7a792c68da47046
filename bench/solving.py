"""Processor time that calibrated methods take to solve the layers of a real language model, beside an earlier version.

    python -m bench.solving CHECKPOINT --text FILE [FILE ...] [--against FOLDER] [--methods gptq awq mbq] [--json FILE]

CHECKPOINT is one that `bench.real_weights` reads. Some blocks of its decoder (`--blocks`) are solved once by each
method, from statistics of `--tokens` tokens of text, a quarter of them held out, roles in turns of 64 tokens. FOLDER
has another version of the package as a folder `lmms_plugin` (`pip install --no-deps --target FOLDER CHECKOUT`): each
version runs in a process of its own on the same statistics, by turns. Seconds are medians of `--repeats`, and `ratio`
is the earlier version's median over ours. `differing` is the share of layers that differ in any stored number, `error`
the squared output error of all layers over that of the earlier version, on the inputs that were held out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.reporting import Row, machine, write

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ROW = 512
TURN = 64


def gather(checkpoint: str, texts: list[str], tokens: int, blocks: list[int], file: Path) -> None:
    """Write weights and inputs of some blocks: a list of (names, weights, inputs (tokens, columns))."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from bench.real_weights import held_out_rows

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rows = held_out_rows(AutoTokenizer.from_pretrained(checkpoint), texts, tokens)
    decoder = model.model.language_model
    groups = [
        (tuple(f"{block}.{name}" for name in names), [decoder.layers[block].get_submodule(name) for name in names])
        for block in blocks
        for names in GROUPS
    ]
    fed: dict[tuple[str, ...], list[Any]] = {names: [] for names, _ in groups}
    for names, layers in groups:
        layers[0].register_forward_hook(lambda _, inputs, __, names=names: fed[names].append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            decoder(input_ids=row[None], use_cache=False)
    torch.save([(names, [layer.weight.data for layer in layers], fed[names]) for names, layers in groups], file)


def dense_layers(weights: Any) -> list[Any]:
    """Return linear layers with these weights, each (rows, columns)."""
    from torch import nn

    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta") for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return layers


def solve(file: Path, method: str, bits: int, group_size: int, kept: Path) -> float:
    """Solve all groups in this process, write dense weights and errors, return the seconds of the processor."""
    import torch

    from lmms_plugin.quant_backends import get
    from lmms_plugin.quant_backends.plans.plan import QuantSpec
    from lmms_plugin.quant_backends.statistics import InputStatistics, Sensitivity, held_back_rows, squared_errors

    torch.set_num_threads(1)
    backend, spec = get(method), QuantSpec(bits, group_size)
    seconds, found = 0.0, []
    for names, weights, inputs in torch.load(file):
        layers = dense_layers(weights)
        held = InputStatistics.empty(names, weights[0].shape[1], torch.device("cpu"))
        entry = InputStatistics.empty(
            names,
            weights[0].shape[1],
            torch.device("cpu"),
            by_role=backend.by_role,
            holds_back=backend.holds_back,
            keeps_rows=backend.keeps_rows,
        )
        for index, x in enumerate(inputs):
            out = held_back_rows(index, len(inputs))
            entry.add(x, torch.arange(len(x)) // TURN % 2 * 2, out)
            held.add(x[out])
        entry.sensitivity = Sensitivity(0.5, 1.0, 0.5)
        started = time.process_time()
        solutions = backend.solve(layers, [spec] * len(layers), entry)
        seconds += time.process_time() - started
        for solution, weight in zip(solutions, weights, strict=True):
            dense = solution.layer.dense_rows(0, len(weight)).float()
            found.append((dense, float(squared_errors(dense - weight, held.gram).sum())))
    torch.save(found, kept)
    return seconds


def compare(ours: Path, theirs: Path) -> tuple[float, float]:
    """Return the share of layers that differ, and the squared error of ours over theirs."""
    import torch

    pairs = list(zip(torch.load(ours), torch.load(theirs), strict=True))
    differing = sum(not torch.equal(one, other) for (one, _), (other, _) in pairs)
    return differing / len(pairs), sum(one for (_, one), _ in pairs) / sum(other for _, (_, other) in pairs)


def child(folder: Path | None, *arguments: str) -> float:
    """Return what this module prints in a process of its own, with the package in a folder if there is one."""
    checkout = str(Path(__file__).resolve().parents[1])
    paths = [checkout] if folder is None else [str(folder), checkout]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "bench.solving", "--solve", *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr}")
    return float(finished.stdout.splitlines()[-1])


def measure(file: Path, given: argparse.Namespace, weights: int) -> Iterator[Row]:
    """Yield one row per method."""
    versions = {"ours": None} | ({} if given.against is None else {"theirs": given.against.resolve()})
    for method in given.methods:
        seconds: dict[str, list[float]] = {version: [] for version in versions}
        for _ in range(given.repeats):
            for version, folder in versions.items():
                kept = str(file.with_name(version))
                asked = (str(file), method, str(given.bits), str(given.group_size), kept)
                seconds[version].append(child(folder, *asked))
        medians = {version: statistics.median(each) for version, each in seconds.items()}
        row: Row = {"case": method, "ratio": None, "seconds_per_million": medians["ours"] / weights * 1e6}
        if given.against is not None:
            row["theirs_per_million"] = medians["theirs"] / weights * 1e6
            row["ratio"] = medians["theirs"] / medians["ours"]
            row["differing"], row["error"] = compare(file.with_name("ours"), file.with_name("theirs"))
        yield row


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--text", nargs="+", type=Path, help="files of plain text")
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq", "mbq"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[0, 10, 29])
    parser.add_argument("--tokens", type=int, default=8 * ROW)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--solve", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.solve:
        file, method, bits, group_size, kept = given.solve
        print(solve(Path(file), method, int(bits), int(group_size), Path(kept)))
        return
    import torch

    texts = [file.read_text(encoding="utf-8", errors="replace") for file in given.text]
    print(machine(), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layers"
        gather(given.checkpoint, texts, given.tokens, given.blocks, file)
        weights = sum(weight.numel() for _, group, _ in torch.load(file) for weight in group)
        for row in measure(file, given, weights):
            rows.append(row)
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()
                )
            )
            write(given.json, rows)


if __name__ == "__main__":
    main()
