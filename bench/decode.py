"""Tokens per second of packed weights against 16-bit ones while decoding.

    python -m bench.decode
    python -m bench.decode --hidden 2048 --layers 8 --batch 1 8 --json decode.json
    python -m bench.decode --shape 3b --device cuda

The model is a stack of the seven linear layers of a decoder block with random weights, of the shapes of a real language
model and larger than the processor's cache, so that weights come from memory as they do in decoding; attention over the
cache and norms, which quantization leaves alone, are left out. Dense and packed models take turns; on a CPU with one
thread it is the processor's time that counts. `--rows` adds the time of one block against the rows of activations, by
kernel and dequantized: where they cross is `MOST_ROWS` in `quant_backends/layers/kernels.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.reporting import Row, interleaved, machine, write
from lmms_plugin.quant_backends.layers.kernels import MOST_ROWS
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import QuantSpec

ROWS = (1, 8, 16, 32, 64, 128, 512)


class Sizes(NamedTuple):
    """Width of a decoder, of its keys, and of its MLP, and the number of its blocks."""

    hidden: int
    kv: int
    inner: int
    layers: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Sizes:
        """Return those of a shape, or of a width."""
        if arguments.shape is None:
            hidden = arguments.hidden
            return cls(hidden, hidden // 4, hidden * 11 // 4, arguments.layers)
        from bench.shapes import SHAPES

        shape = SHAPES[arguments.shape]
        return cls(shape.hidden, shape.hidden // shape.heads * shape.kv_heads, shape.inner, shape.layers)


class Block(nn.Module):
    """The linear layers of one decoder block."""

    def __init__(self, sizes: Sizes, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        hidden, kv, inner, _ = sizes
        self.repeats = hidden // kv
        self.q, self.k, self.v, self.o = (make(hidden, rows) for rows in (hidden, kv, kv, hidden))
        self.gate, self.up, self.down = make(hidden, inner), make(hidden, inner), make(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the data flow of a block: shapes and dependencies, not its meaning."""
        x = x + self.o(self.q(x)) + (self.k(x) + self.v(x)).repeat(1, self.repeats)
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1)


def stack(sizes: Sizes, make: Callable[[int, int], nn.Module]) -> nn.Sequential:
    """Return the whole model."""
    return nn.Sequential(*(Block(sizes, make) for _ in range(sizes.layers)))


def packer(bits: int, group_size: int, dtype: torch.dtype, device: str) -> Callable[[int, int], nn.Module]:
    """Return what makes one packed layer of random weights."""

    def make(columns: int, rows: int) -> nn.Module:
        weight = (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype)
        spec = QuantSpec(bits, min(group_size, columns))
        return PackedLinear.from_codes(round_by_blocks(weight, spec), spec, columns)

    return make


def dense(dtype: torch.dtype, device: str) -> Callable[[int, int], nn.Module]:
    """Return what makes one dense layer of random weights."""
    return lambda columns, rows: nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)


def clock_of(device: str) -> Callable[[], float]:
    """Return what tells the time: the processor's own on a CPU, a GPU's after its work is done."""
    if device == "cpu":
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def after_work() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_work


@torch.inference_mode()
def decode(arguments: argparse.Namespace) -> list[Row]:
    """Return and print one row per number of bits and batch size, and write them as they come."""
    dtype, device, sizes = getattr(torch, arguments.dtype), arguments.device, Sizes.of(arguments)
    plain = stack(sizes, dense(dtype, device))
    size = sum(weight.numel() * weight.element_size() for weight in plain.parameters())
    print(f"{len(plain)} blocks of hidden size {sizes.hidden}, {size / 1e6:.0f} MB in {arguments.dtype}")
    print(f"{'bits':>4} {'batch':>5} {'tokens/s':>9} {'dense':>9} {'ratio':>6} {'MB':>7}  kernel")
    rows: list[Row] = []
    for bits in arguments.bits:
        packed = stack(sizes, packer(bits, arguments.group_size, dtype, device))
        for batch in arguments.batch:
            x = torch.randn(batch, sizes.hidden).to(device, dtype)
            calls = {"packed": partial(packed, x), "dense": partial(plain, x)}
            seconds = interleaved(calls, arguments.repeats, clock_of(device))
            rows.append(_row(bits, batch, seconds, packed) | {"dense_bytes": size})
            write(arguments.json, rows)
    return rows


def _row(bits: int, batch: int, seconds: dict[str, float], model: nn.Module) -> Row:
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    row: Row = {
        "case": f"{bits} bits, batch {batch}",
        "ratio": seconds["dense"] / seconds["packed"],
        "tokens_per_second": batch / seconds["packed"],
        "dense_tokens_per_second": batch / seconds["dense"],
        "kernels": sorted({layer.kernel for layer in layers}),
        "bytes": sum(layer.weight_bytes for layer in layers),
    }
    print(
        f"{bits:>4} {batch:>5} {row['tokens_per_second']:>9.1f} {row['dense_tokens_per_second']:>9.1f} "
        f"{row['ratio']:>6.2f} {row['bytes'] / 1e6:>7.1f}  {', '.join(row['kernels'])}",
        flush=True,
    )
    return row


@torch.inference_mode()
def crossing(arguments: argparse.Namespace) -> list[Row]:
    """Return and print the time of one block by kernel and dequantized, for several numbers of rows of activations."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    sizes = Sizes.of(arguments)._replace(layers=1)
    plain = stack(sizes, dense(dtype, device))
    table = []
    print(f"{'bits':>4} {'rows':>5} {'kernel ms':>10} {'dequantize ms':>14} {'dense ms':>9}")
    for bits in arguments.bits:
        packed = stack(sizes, packer(bits, arguments.group_size, dtype, device))
        for rows in ROWS:
            x = torch.randn(rows, sizes.hidden).to(device, dtype)
            calls = {
                "kernel": partial(_with_limit, packed, x, sys.maxsize),
                "dequantize": partial(_with_limit, packed, x, 0),
                "dense": partial(plain, x),
            }
            seconds = interleaved(calls, 3, clock_of(device))
            row: Row = {"case": f"{bits} bits, {rows} rows", "ratio": seconds["dequantize"] / seconds["kernel"]}
            table.append(row | {f"{name}_ms": 1e3 * value for name, value in seconds.items()})
            print(
                f"{bits:>4} {rows:>5} "
                + "{kernel:>10.2f} {dequantize:>14.2f} {dense:>9.2f}".format(
                    **{name: 1e3 * value for name, value in seconds.items()}
                ),
                flush=True,
            )
    return table


def _with_limit(model: nn.Module, x: Tensor, most_rows: int) -> None:
    with patch.dict(MOST_ROWS, dict.fromkeys(MOST_ROWS, most_rows)):
        model(x)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--shape", help="a name in bench/shapes.py, in the place of hidden size and layers")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", action="store_true", help="also the time against rows of activations")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(machine())
    write(arguments.json, decode(arguments) + (crossing(arguments) if arguments.rows else []))


if __name__ == "__main__":
    main()
