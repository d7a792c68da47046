"""What shares the scale of a layer's inputs: all tokens, those of a modality, or none, on the demo.

    python -m bench.activation_scales [--samples 16] [--held-out 16] [--shift gaussian_noise_3] [--json FILE]

Weights by GPTQ, calibrated on scenes of the demo's validation part; errors are those on other scenes, clean and
shifted, against the unquantized model: ‖Z − Ẑ‖ / ‖Z‖ of the logits at the positions that predict the answer, and the
share of these positions at which the likeliest token is another one.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

from bench.hessian_methods import Batches, logits_of, relative
from bench.reporting import Row, machine, markdown, write
from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import LoadedModel, load_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import ROLES, TOKEN_ROLES

PRECISIONS = {
    "W8A8": ("int8", {"bits": 8, "group_size": -1}),
    "W4A8": ("int8", {"bits": 4, "group_size": 32}),
    "W4A4": ("int4", {"bits": 4, "group_size": 32}),
}
GRANULARITIES = ("tensor", "modality", "token")


def batches_of(loaded: LoadedModel, source: str) -> Batches:
    """Return the samples of a calibration source, with the roles of their positions."""
    spec = CalibrationSpec.parse(source)
    dialect = dialect_for(loaded.model.config.model_type)
    found, _ = build_batches(
        loaded.model, loaded.processor, spec, spec.load_samples(), dialect, keep_logits=True, by_role=True
    )
    return found


def at_answers(model: torch.nn.Module, batches: Batches) -> list[Tensor]:
    """Return the logits of each sample at the positions that predict its answer."""
    masks = [(batch[TOKEN_ROLES] == ROLES.index("answer")).roll(-1) for batch in batches]
    return [logits[mask] for logits, mask in zip(logits_of(model, batches), masks, strict=True)]


def measure(dense: LoadedModel, calibration: Batches, unseen: dict[str, Batches]) -> list[Row]:
    """Quantize in every precision with every granularity, vision tower and connector included."""
    exact = {name: at_answers(dense.model, batches) for name, batches in unseen.items()}
    rows: list[Row] = []
    for precision, (name, options) in PRECISIONS.items():
        plan = QuantPlan.from_arguments(
            symmetric=True, vision_bits=options["bits"], connector_bits=options["bits"], **options
        )
        for granularity in GRANULARITIES:
            model = copy.deepcopy(dense.model)
            quantize(model, get("gptq", activation_format=name, activation_granularity=granularity), plan, calibration)
            row: Row = {"precision": precision, "scale per": granularity}
            for kind, batches in unseen.items():
                found = at_answers(model, batches)
                apart = torch.cat([one.argmax(1) != two.argmax(1) for one, two in zip(exact[kind], found, strict=True)])
                row |= {f"{kind}, error": relative(exact[kind], found), f"{kind}, other": float(apart.float().mean())}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default=str(CHECKPOINT))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--shift", default="gaussian_noise_3")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(machine())
    dense = load_quantized(given.pretrained, backend=get("none"), plan=QuantPlan(), dtype=torch.float32)
    source = f"demo:n={given.samples + given.held_out}"
    clean, shifted = batches_of(dense, source), batches_of(dense, f"{source}:shift={given.shift}")
    unseen = {"clean": clean[given.samples :], given.shift: shifted[given.samples :]}
    rows = measure(dense, clean[: given.samples], unseen)
    heads = tuple(rows[0])
    cells = [tuple(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()) for row in rows]
    print("\n".join(markdown(heads, cells)))
    write(given.json, rows)


if __name__ == "__main__":
    main()
