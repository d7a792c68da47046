"""Memory and time of quantizing a checkpoint of a billion parameters, each method in a process of its own.

    python -m bench.quantize [--methods rtn awq gptq] [--samples N] [--layers N] [--json FILE]
    python -m bench.quantize --shape 3b --device cuda --methods rtn hqq awq gptq

The checkpoint is a Qwen2.5-VL of random bfloat16 weights in shards of 500 MB: a decoder of 255 M parameters, which is
quantized; the family's own vision tower of 0.6 billion and embeddings of 0.2, which stay as they are.
What is measured is the anonymous resident memory of the process above what it had before loading, sampled every 5 ms:
what the system cannot take back. Weights that stay dense, and those that still wait for their turn, are pages of the
checkpoint's files, which it can; they are in `resident_mb`, too. The bound that is checked on a
CPU: a quarter of the dense model. On a GPU its memory is told, too, at the highest and when all is quantized.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.reporting import Row, machine, write

METHODS = ("rtn", "hqq", "awq")
SHAPE = "wide_vision"
MB = 1e6
BOUND = 0.25
"""Of the dense model's bytes."""


def resident() -> tuple[int, int]:
    """Return (anonymous, whole) resident bytes of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, whole = (int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return anonymous, whole


class MemoryWatch:
    """Samples resident memory every 5 ms in a thread of its own."""

    def __enter__(self) -> MemoryWatch:
        self.before = resident()
        self.peak = self.before
        self.running = True
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        while self.running:
            self.peak = tuple(map(max, self.peak, resident()))
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def measure(arguments: argparse.Namespace) -> Row:
    """Load and quantize the checkpoint in this process and return what it took."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401  # so that its modules are not counted

    from lmms_plugin.quant_backends import get
    from lmms_plugin.quant_backends.backend import CalibratedBackend
    from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
    from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
    from lmms_plugin.quant_backends.plans.plan import QuantPlan

    (method,) = arguments.methods
    if method == "hqq":
        import hqq.core.quantize  # noqa: F401
    backend = get(method)
    calibrated = isinstance(backend, CalibratedBackend)
    calibration = CalibrationSpec("noise", samples=arguments.samples) if calibrated else None
    plan = QuantPlan.from_arguments(bits=arguments.bits, group_size=arguments.group_size)
    with MemoryWatch() as memory:
        loaded = load_quantized(
            arguments.checkpoint,
            backend=backend,
            plan=plan,
            calibration=calibration,
            dtype=torch.bfloat16,
            device=arguments.device,
            resume=False,
        )
    report = loaded.report
    anonymous, resident = (after - before for after, before in zip(memory.peak, memory.before, strict=True))
    more = {} if report.calibration is None else {"tokens": report.calibration.tokens}
    if arguments.device.startswith("cuda"):
        more |= {
            "device_mb": torch.cuda.memory_allocated() / MB,
            "device_peak_mb": torch.cuda.max_memory_allocated() / MB,
        }
    return {
        "case": method,
        "ratio": report.bytes_before / anonymous,
        "seconds": report.seconds,
        "bits_per_weight": report.bits_per_weight,
        "quantized_layers": len(report.quantized),
        "dense_mb": report.bytes_before / MB,
        "packed_mb": sum(module.bytes_after for module in report.quantized) / MB,
        "anonymous_mb": anonymous / MB,
        "resident_mb": resident / MB,
        "bound_mb": BOUND * report.bytes_before / MB,
        "within_bound": anonymous <= BOUND * report.bytes_before,
        **more,
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2, help="of noise, for calibrated methods")
    parser.add_argument("--shape", default=SHAPE, help="a name in bench/shapes.py")
    parser.add_argument("--layers", type=int, help="of the decoder, in the place of the shape's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--written", type=Path, help="folder with a checkpoint of that shape; written if it is empty")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(arguments: argparse.Namespace, folder: Path, method: str) -> Row:
    """Measure a method in a process of its own, which fails if it does."""
    command = [sys.executable, "-m", "bench.quantize", "--checkpoint", str(folder), "--methods", method]
    for name in ("bits", "group_size", "samples", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{method} failed:\n{finished.stderr}")
    row: Row = json.loads(finished.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Write the checkpoint, run each method in a child process, print and write one row each."""
    arguments = parse()
    if arguments.checkpoint:
        print(json.dumps(measure(arguments)))
        return
    from bench.shapes import SHAPES, written

    shape = SHAPES[arguments.shape]
    shape = shape._replace(layers=arguments.layers or shape.layers)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = written(arguments.written or Path(temporary), shape, arguments.device)
        print(f"{machine()}\n{arguments.shape}, {shape.layers} blocks of the decoder", flush=True)
        failed = False
        for method in arguments.methods:
            try:
                row = child(arguments, folder, method)
            except RuntimeError as error:
                # What the others take is worth knowing all the same.
                print(error, file=sys.stderr, flush=True)
                failed = True
                continue
            rows.append(row)
            shown = (
                f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print("  ".join(shown), flush=True)
            write(arguments.json, rows)
    # A model of another shape may be smaller than what the libraries take by themselves.
    if arguments.shape == SHAPE and arguments.device == "cpu" and not all(row["within_bound"] for row in rows):
        sys.exit("anonymous memory went above the bound")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
