"""Tokens per second of packed weights against 16-bit ones while decoding.

    python -m bench.decode
    python -m bench.decode --hidden 2048 --layers 8 --batch 1 8 --json decode.json

The model is a stack of the seven linear layers of a decoder block with random weights, of the shapes of a real language
model and larger than the processor's cache, so that weights come from memory as they do in decoding; attention over the
cache and norms, which quantization leaves alone, are left out. Dense and packed models take turns, and the ratio is the
median over the turns, so that a busy machine slows both. `--rows` adds the time of one block against the rows of
activations, by kernel and dequantized: where they cross is `MOST_ROWS` in `quant_backends/native_kernels.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.kernels import arithmetic_dtype
from lmms_plugin.quant_backends.linear import PackedLinear
from lmms_plugin.quant_backends.native_kernels import MOST_ROWS
from lmms_plugin.quant_backends.plan import QuantSpec
from lmms_plugin.quant_backends.rtn import round_by_blocks

ROWS = (1, 8, 16, 32, 64, 128, 512)


class Result(NamedTuple):
    """Decoding with one number of bits at one batch size.

    Attributes:
        bits: Of the packed weights.
        batch: Sequences decoded together.
        tokens_per_second: Of all sequences together; median.
        dense_tokens_per_second: The same with dense weights.
        ratio: Median of the ratios packed to dense; above 1 is faster.
        kernels: What the layers ran on.
        bytes: Of the packed weights.
    """

    bits: int
    batch: int
    tokens_per_second: float
    dense_tokens_per_second: float
    ratio: float
    kernels: tuple[str, ...]
    bytes: int


class Block(nn.Module):
    """The linear layers of one decoder block."""

    def __init__(self, hidden: int, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        kv, inner = hidden // 4, hidden * 11 // 4
        self.q, self.k, self.v, self.o = (make(hidden, rows) for rows in (hidden, kv, kv, hidden))
        self.gate, self.up, self.down = make(hidden, inner), make(hidden, inner), make(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the data flow of a block: shapes and dependencies, not its meaning."""
        x = x + self.o(self.q(x)) + (self.k(x) + self.v(x)).repeat(1, 4)
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1)


def stack(hidden: int, layers: int, make: Callable[[int, int], nn.Module]) -> nn.Sequential:
    """Return the whole model."""
    return nn.Sequential(*(Block(hidden, make) for _ in range(layers)))


def packer(bits: int, group_size: int, dtype: torch.dtype, device: str) -> Callable[[int, int], nn.Module]:
    """Return what makes one packed layer of random weights."""

    def make(columns: int, rows: int) -> nn.Module:
        weight = (torch.randn(rows, columns) / columns**0.5).to(device, dtype)
        spec = QuantSpec(bits, group_size)
        return PackedLinear.from_codes(round_by_blocks(weight, spec), spec, columns)

    return make


def dense(dtype: torch.dtype, device: str) -> Callable[[int, int], nn.Module]:
    """Return what makes one dense layer of random weights."""
    return lambda columns, rows: nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the wall time of one run, on a GPU until its work is done."""
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def compare(packed: nn.Module, plain: nn.Module, x: Tensor, repeats: int) -> tuple[float, float, float]:
    """Return median seconds of both models and the median of plain / packed."""
    pairs = []
    for repeat in range(repeats + 1):
        pair = tuple(seconds(lambda model=model: model(x), x.device.type) for model in (packed, plain))
        if repeat:  # the first run chooses kernels
            pairs.append(pair)
    ratio = statistics.median(slow / fast for fast, slow in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


@torch.inference_mode()
def crossing(packed: nn.Module, plain: nn.Module, x: Tensor, repeats: int) -> dict[str, float]:
    """Return the milliseconds of one block by kernel, dequantized and dense."""
    milliseconds: dict[str, float] = {}
    for name, most in (("kernel", 1 << 30), ("dequantize", 0)):
        with patch.dict(MOST_ROWS, dict.fromkeys(MOST_ROWS, most)):
            milliseconds[name] = 1e3 * min(seconds(lambda: packed(x), "cpu") for _ in range(repeats))
    milliseconds["dense"] = 1e3 * min(seconds(lambda: plain(x), "cpu") for _ in range(repeats))
    return milliseconds


def machine(device: str) -> str:
    """Describe what this ran on."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    native = arithmetic_dtype(torch.bfloat16, "cpu") == torch.bfloat16
    return (
        f"{names[0].partition(': ')[2] if names else platform.processor()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {'' if native else 'no '}bfloat16 arithmetic, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def measure(arguments: argparse.Namespace) -> list[Result]:
    """Run all cells and print a line for each."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    plain = stack(arguments.hidden, arguments.layers, dense(dtype, device))
    plain_bytes = sum(weight.numel() * weight.element_size() for weight in plain.parameters())
    print(f"{len(plain)} blocks of hidden size {arguments.hidden}, {plain_bytes / 1e6:.0f} MB in {arguments.dtype}")
    print(f"{'bits':>4} {'batch':>5} {'tokens/s':>9} {'dense':>9} {'ratio':>6} {'MB':>7}  kernel")
    results = []
    for bits in arguments.bits:
        packed = stack(arguments.hidden, arguments.layers, packer(bits, arguments.group_size, dtype, device))
        layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
        kernels = tuple(sorted({layer.kernel for layer in layers}))
        size = sum(layer.weight_bytes for layer in layers)
        for batch in arguments.batch:
            x = torch.randn(batch, arguments.hidden).to(device, dtype)
            fast, slow, ratio = compare(packed, plain, x, arguments.repeats)
            result = Result(bits, batch, batch / fast, batch / slow, ratio, kernels, size)
            results.append(result)
            print(
                f"{bits:>4} {batch:>5} {result.tokens_per_second:>9.1f} {result.dense_tokens_per_second:>9.1f} "
                f"{ratio:>6.2f} {size / 1e6:>7.1f}  {', '.join(kernels)}",
                flush=True,
            )
    return results


def rows_table(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Measure and print where kernel and dequantizing cross, at each number of bits."""
    dtype = getattr(torch, arguments.dtype)
    plain = stack(arguments.hidden, 1, dense(dtype, "cpu"))
    table = []
    print(f"{'bits':>4} {'rows':>5} {'kernel ms':>10} {'dequantize ms':>14} {'dense ms':>9}")
    for bits in arguments.bits:
        packed = stack(arguments.hidden, 1, packer(bits, arguments.group_size, dtype, "cpu"))
        for rows in ROWS:
            row = crossing(packed, plain, torch.randn(rows, arguments.hidden).to(dtype), 3)
            table.append({"bits": bits, "rows": rows} | row)
            print(
                f"{bits:>4} {rows:>5} {row['kernel']:>10.2f} {row['dequantize']:>14.2f} {row['dense']:>9.2f}",
                flush=True,
            )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", action="store_true", help="also the time against rows of activations, on the CPU")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(machine(arguments.device))
    results = measure(arguments)
    rows = rows_table(arguments) if arguments.rows else []
    if arguments.json:
        content = {
            "machine": machine(arguments.device),
            "hidden": arguments.hidden,
            "layers": arguments.layers,
            "group_size": arguments.group_size,
            "dtype": arguments.dtype,
            "decode": [result._asdict() for result in results],
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
