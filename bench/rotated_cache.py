"""What a rotation of keys and values is worth in a quantized cache, on the demo.

    python -m bench.rotated_cache [--samples 48] [--shift gaussian_noise_3] [--json FILE]

The answers of the model without quantization are scored over quantized caches, clean and shifted: the mean change of a
token's log-probability, in nats and without sign, and the share of answers that would no longer be written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.reporting import Row, machine, markdown, write
from lmms_plugin.quant_backends.calibration.sources import CalibrationSample, CalibrationSpec
from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.vlm import wrapper as models
from lmms_plugin.vlm.contracts.settings import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=48)
CASES = [
    CacheSpec(bits, bits, key_axis=axis, part=part, rotation=rotation)
    for bits in (4, 2)
    for part, axis in (("keys", "token"), ("keys", "channel"), ("both", "token"))
    for rotation in ("none", "hadamard")
]


def inputs_of(vlm: Any, samples: Sequence[CalibrationSample]) -> dict[str, Any]:
    """Return a batch of questions for boxes."""
    prompts = [vlm.reader.read([_asking(one)], "a sample") for one in samples]
    inputs: dict[str, Any] = vlm.chat.encode(prompts).inputs
    return inputs


def _asking(sample: CalibrationSample) -> dict[str, Any]:
    text = {"type": "text", "text": f"Where is {sample.expression}?"}
    box = {"expression": sample.expression, "original_size": list(sample.image.size)}
    return {"role": "user", "content": [{"type": "image", "url": sample.image}, text], "grounding": box}


def measure(vlm: Any, batches: dict[str, dict[str, Any]]) -> list[Row]:
    """Score the answers over every cache."""
    decoder = vlm.responder.engine.decoder
    plain = decoder.with_plain_cache
    answers = {name: [one.ids for one in plain.generate(inputs, SETTINGS)] for name, inputs in batches.items()}
    exact = {name: plain.score(inputs, answers[name]) for name, inputs in batches.items()}
    rows: list[Row] = []
    for spec in CASES:
        vlm.cache_quantizer.spec = spec
        row: Row = {"cache": f"int{spec.bits} {spec.part}, scales per {spec.key_axis}", "rotation": spec.rotation}
        for name, inputs in batches.items():
            found = decoder.score(inputs, answers[name])
            pairs = zip(exact[name], found, strict=True)
            changes = [abs(a - b) for one, two in pairs for a, b in zip(one.logprobs, two.logprobs, strict=True)]
            row |= {
                f"{name}, change": sum(changes) / len(changes),
                f"{name}, other answers": sum(not one.is_greedy for one in found) / len(found),
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="demo")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--shift", default="gaussian_noise_3")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(machine())
    vlm = models.QuantNone(pretrained=given.pretrained, device="cpu", kv_bits=8)
    source = f"demo:n={given.samples}"
    samples = {name: CalibrationSpec.parse(f"{source}{more}") for name, more in _kinds(given.shift).items()}
    rows = measure(vlm, {name: inputs_of(vlm, spec.load_samples()) for name, spec in samples.items()})
    cells = [tuple(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()) for row in rows]
    print("\n".join(markdown(tuple(rows[0]), cells)))
    write(given.json, rows)


def _kinds(shift: str) -> dict[str, str]:
    return {"clean": "", shift: f":shift={shift}"}


if __name__ == "__main__":
    main()
