"""Seconds that AWQ's scale search takes: ours, batched and by second moments, against a loop of the authors' kind.

    python -m bench.scale_search
    python -m bench.scale_search --hidden 1024 --tokens 16384 --json scale_search.json

The loop rounds the weights of a group of layers for one of the 20 scales, sends all calibration tokens through them,
compares with the exact outputs, and goes on to the next scale. Ours includes the gathering of the moments, which is
where its own time with the tokens goes. Both get the same layers and inputs, take turns, and must choose the same
scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.reporting import Row, interleaved, machine, write
from lmms_plugin.quant_backends.methods.scale_search import EXPONENTS, GramError, search_scales
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics


class Group(NamedTuple):
    """Layers that are fed one tensor.

    Attributes:
        name: What they are in a decoder block.
        weights: Each (rows, columns) float32.
        inputs: (tokens, columns) float32, a few columns being much larger than the rest.
    """

    name: str
    weights: tuple[Tensor, ...]
    inputs: Tensor


def groups(hidden: int, tokens: int) -> list[Group]:
    """Return the groups of a decoder block with random weights, its MLP 2.75 times as wide as the rest."""
    generator = torch.Generator().manual_seed(0)
    wide = hidden * 11 // 4
    shapes = {"query, key, value": (hidden,) * 3, "gate, up": (wide,) * 2, "down": (hidden,)}
    found = []
    for name, rows in shapes.items():
        columns = wide if name == "down" else hidden
        weights = tuple(torch.randn(count, columns, generator=generator) / columns**0.5 for count in rows)
        loudness = torch.randn(columns, generator=generator).exp()
        found.append(Group(name, weights, torch.randn(tokens, columns, generator=generator) * loudness))
    return found


def by_moments(group: Group, spec: QuantSpec, sample: int) -> float:
    """Gather statistics sample by sample and search; return the exponent."""
    statistics = InputStatistics.empty((group.name,), group.inputs.shape[1], group.inputs.device)
    for x in group.inputs.split(sample):
        statistics.add(x)
    specs = [spec] * len(group.weights)
    return search_scales(group.weights, specs, statistics.mean_magnitude, GramError(statistics.gram)).exponent


def by_loop(group: Group, spec: QuantSpec) -> float:
    """Try one scale after another on all tokens; return the exponent."""
    x = group.inputs
    exact = [x @ weight.T for weight in group.weights]
    magnitude = x.abs().mean(0)
    losses = []
    for exponent in EXPONENTS:
        scale = magnitude.pow(exponent).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        changes = (
            x @ (fake_quantized(weight * scale, spec) / scale).T - output
            for weight, output in zip(group.weights, exact, strict=True)
        )
        losses.append(sum(float(change.square().sum()) for change in changes))
    return EXPONENTS[losses.index(min(losses))]


def fake_quantized(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return a weight rounded to asymmetric groups and back, as the authors write it."""
    parts = weight.reshape(-1, spec.group_size or weight.shape[1])
    low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
    highest = 2**spec.bits - 1
    step = (high - low).clamp(min=1e-5) / highest
    zero = (-(low / step).round()).clamp(0, highest)
    return (((parts / step).round() + zero).clamp(0, highest) - zero).mul(step).reshape(weight.shape)


def measure(group: Group, spec: QuantSpec, sample: int, repeats: int) -> Row:
    """Return one line of the table."""
    chosen = {"ours": by_moments(group, spec, sample), "loop": by_loop(group, spec)}
    if chosen["ours"] != chosen["loop"]:
        raise RuntimeError(f"{group.name}: ours chose exponent {chosen['ours']}, the loop {chosen['loop']}")
    seconds = interleaved(
        {"ours": lambda: by_moments(group, spec, sample), "loop": lambda: by_loop(group, spec)}, repeats
    )
    ratio = seconds["loop"] / seconds["ours"]
    return {
        "case": group.name,
        "exponent": chosen["ours"],
        "seconds": seconds["ours"],
        "loop_seconds": seconds["loop"],
        "ratio": ratio,
    }


@torch.no_grad()
def main() -> None:
    """Print the table; write its rows where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="of all samples together")
    parser.add_argument("--sample", type=int, default=256, help="tokens of one sample")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    spec = QuantSpec(arguments.bits, arguments.group_size)
    print(machine())
    print(f"hidden {arguments.hidden}, {arguments.tokens} tokens, {spec.bits} bits, groups of {spec.group_size}")
    print(f"{'case':<20}{'exponent':>10}{'ours s':>10}{'loop s':>10}{'ratio':>8}")
    rows = []
    for group in groups(arguments.hidden, arguments.tokens):
        moved = Group(
            group.name, tuple(w.to(arguments.device) for w in group.weights), group.inputs.to(arguments.device)
        )
        row = measure(moved, spec, arguments.sample, arguments.repeats)
        rows.append(row)
        print(
            f"{row['case']:<20}{row['exponent']:>10.2f}{row['seconds']:>10.2f}{row['loop_seconds']:>10.2f}"
            f"{row['ratio']:>8.1f}",
            flush=True,
        )
    total = {key: sum(row[key] for row in rows) for key in ("seconds", "loop_seconds")}
    ratio = total["loop_seconds"] / total["seconds"]
    rows.append({"case": "block", "exponent": None, **total, "ratio": ratio})
    print(f"{'block':<20}{'':>10}{total['seconds']:>10.2f}{total['loop_seconds']:>10.2f}{ratio:>8.1f}")
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
