"""Memory and time of quantizing a checkpoint of a billion parameters, each method in a process of its own.

    python -m bench.quantize [--methods rtn awq gptq] [--samples N] [--layers N] [--json FILE]

The checkpoint is a Qwen2.5-VL of random bfloat16 weights in shards of 500 MB: a decoder of 255 M parameters, which is
quantized (`--layers 36`); the family's own vision tower of 0.6 billion and embeddings of 0.2, which stay as they are.
What is measured is the anonymous resident memory of the process above what it had before loading, sampled every 5 ms:
what the system cannot take back. Weights that stay dense, and those that still wait for their turn, are pages of the
checkpoint's files, which it can; they are in `resident_mb`, too. The bound that is checked: a quarter of the dense
model.
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


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write the random checkpoint; return its number of parameters."""
    import torch
    from helpers.families import BUILDERS
    from transformers import AutoModelForImageTextToText

    config, processor = BUILDERS["qwen2_5_vl"]()
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 768, 2048, layers, 151_936
    text.num_attention_heads = text.num_key_value_heads = 12
    text.tie_word_embeddings = config.tie_word_embeddings = False
    # Multi-axis rotary positions share half of a head's dimensions.
    text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [8, 12, 12]}
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 1280, 3420, 32, 16
    vision.out_hidden_size, vision.fullatt_block_indexes = text.hidden_size, [7, 15, 23, 31]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(folder: str, method: str, bits: int, group_size: int, samples: int) -> Row:
    """Load and quantize the checkpoint in this process and return what it took."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401  # so that its modules are not counted

    from lmms_plugin.quant_backends import get
    from lmms_plugin.quant_backends.backend import CalibratedBackend
    from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
    from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
    from lmms_plugin.quant_backends.plans.plan import QuantPlan

    if method == "hqq":
        import hqq.core.quantize  # noqa: F401
    backend = get(method)
    calibration = CalibrationSpec("noise", samples=samples) if isinstance(backend, CalibratedBackend) else None
    plan = QuantPlan.from_arguments(bits=bits, group_size=group_size)
    with MemoryWatch() as memory:
        loaded = load_quantized(
            folder, backend=backend, plan=plan, calibration=calibration, dtype=torch.bfloat16, resume=False
        )
    report = loaded.report
    anonymous, resident = (after - before for after, before in zip(memory.peak, memory.before, strict=True))
    calibrated = {} if report.calibration is None else {"tokens": report.calibration.tokens}
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
        **calibrated,
    }


def main() -> None:
    """Write the checkpoint, run each method in a child process, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2, help="of noise, for calibrated methods")
    parser.add_argument("--layers", type=int, default=36, help="of the decoder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        (method,) = arguments.methods
        row = measure(arguments.checkpoint, method, arguments.bits, arguments.group_size, arguments.samples)
        print(json.dumps(row))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder), arguments.layers)
        print(f"{machine()}\n{parameters / 1e6:.0f} M parameters, {2 * parameters / MB:.0f} MB in bfloat16", flush=True)
        for method in arguments.methods:
            child = [sys.executable, "-m", "bench.quantize", "--checkpoint", folder, "--methods", method]
            child += ["--bits", str(arguments.bits), "--group-size", str(arguments.group_size)]
            child += ["--samples", str(arguments.samples)]
            finished = subprocess.run(child, capture_output=True, text=True, check=False)
            if finished.returncode:
                sys.exit(f"{method} failed:\n{finished.stderr}")
            row = json.loads(finished.stdout.splitlines()[-1]) | {"parameters": parameters}
            rows.append(row)
            shown = (
                f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print("  ".join(shown), flush=True)
    write(arguments.json, rows)
    if not all(row["within_bound"] for row in rows):
        sys.exit("anonymous memory went above the bound")


if __name__ == "__main__":
    main()
