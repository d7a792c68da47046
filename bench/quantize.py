"""Time and memory of quantizing a checkpoint of some hundred million parameters, each method in a process of its own.

    python bench/quantize.py --layers 24 --methods none rtn hqq

The checkpoint is a Qwen2.5-VL of random weights, written to a temporary folder in shards. Printed per method:
parameters and buffers at the end; the largest sum of those and the layer in hand, dense and packed, at any moment; the
largest anonymous and whole resident memory of the process above what it had before loading (whole counts the
checkpoint's mapped pages too, which the system may drop); seconds.
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

MB = 1e6


def write_checkpoint(folder: Path, layers: int, hidden: int) -> int:
    """Write a random checkpoint in shards of 100 MB; return its number of parameters."""
    import torch
    from families import BUILDERS
    from transformers import AutoModelForImageTextToText

    config, processor = BUILDERS["qwen2_5_vl"]()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, hidden * 11 // 4, layers
    text.num_attention_heads = text.num_key_value_heads = hidden // 64
    # Multi-axis rotary positions share half of a head's dimensions.
    text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [8, 12, 12]}
    text.layer_types = ["full_attention"] * layers
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


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


def measure(folder: str, method: str, bits: int, group_size: int, samples: int) -> dict[str, float]:
    """Load and quantize the checkpoint in this process and return what it took."""
    import torch

    from lmms_plugin.quant_backends import get
    from lmms_plugin.quant_backends.backend import CalibratedLinear
    from lmms_plugin.quant_backends.calibration import CalibrationSpec
    from lmms_plugin.quant_backends.loading import load_quantized
    from lmms_plugin.quant_backends.plan import QuantPlan
    from lmms_plugin.quant_backends.quantization import Quantization, tensor_bytes

    torch.set_num_threads(1)
    largest = 0
    replace = Quantization.replace

    def watch(self: Quantization, item: CalibratedLinear, weight: torch.Tensor) -> None:
        nonlocal largest
        present = [t for t in (*self.model.parameters(), *self.model.buffers()) if not t.is_meta]
        # By address: the weight in hand is a part of the model when quantization comes after loading.
        held = {t.data_ptr(): t.numel() * t.element_size() for t in (*present, weight, *item.layer.buffers())}
        largest = max(largest, sum(held.values()))
        replace(self, item, weight)

    Quantization.replace = watch  # type: ignore[method-assign]
    if method == "hqq":
        import hqq.core.quantize  # noqa: F401  # so that the library itself is not counted
    get(method)
    plan = (
        QuantPlan()
        if method == "none"
        else QuantPlan.from_arguments(bits=bits, group_size=group_size, vision_bits=bits)
    )
    calibration = CalibrationSpec("noise", samples=samples) if method == "awq" else None
    # A first load of nothing but the configuration brings in transformers' own modules.
    from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

    with MemoryWatch() as memory:
        loaded = load_quantized(folder, backend=get(method), plan=plan, calibration=calibration)
    report = loaded.report
    return {
        "seconds": report.seconds,
        "bits_per_weight": report.bits_per_weight,
        "final_mb": tensor_bytes(loaded.model) / MB,
        "largest_tensors_mb": max(largest, tensor_bytes(loaded.model)) / MB,
        "anonymous_mb": (memory.peak[0] - memory.before[0]) / MB,
        "resident_mb": (memory.peak[1] - memory.before[1]) / MB,
    }


def main() -> None:
    """Write the checkpoint, run each method in a child process, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["none", "rtn", "hqq"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=2, help="of noise, for awq")
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoint:
        (method,) = arguments.methods
        result = measure(arguments.checkpoint, method, arguments.bits, arguments.group_size, arguments.samples)
        print(json.dumps(result))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder), arguments.layers, arguments.hidden)
        shards = len(list(Path(folder).glob("*.safetensors")))
        print(f"{parameters / 1e6:.0f} M parameters, bfloat16, {2 * parameters / MB:.0f} MB in {shards} shards")
        for method in arguments.methods:
            child = [sys.executable, __file__, "--checkpoint", folder, "--methods", method]
            child += ["--bits", str(arguments.bits), "--group-size", str(arguments.group_size)]
            child += ["--samples", str(arguments.samples)]
            output = subprocess.run(child, check=True, capture_output=True, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            print(f"{method:<5}" + "".join(f"  {key} {value:.2f}" for key, value in result.items()), flush=True)


if __name__ == "__main__":
    main()
