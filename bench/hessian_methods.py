"""Rounding, GPTQ, GPTAQ and GPTQ with weighted tokens on one model, with the same bits and calibration samples.

    python -m bench.hessian_methods [--pretrained PATH] [--bits 4 3] [--samples 128] [--json FILE]

Errors are those on samples that no calibration saw (made-up images from another seed, questions and answers by the
unquantized model), against the unquantized model. `answers` and `all` are ‖Z − Ẑ‖ / ‖Z‖ of the logits with all layers
quantized at once, over the positions that predict the answer and over all. `layers` is the root mean square over
layers of ‖Y − Ŷ‖ / ‖Y‖ with the unquantized model's inputs, which is not what methods minimise that make up for
earlier layers. SmoothQuant rounds inputs to 8 bits and stands beside rounding that does. `ratio` is the error of
`answers` by rounding over the method's own.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.reporting import Row, machine, markdown, write
from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.held_out import output_errors
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import ALLOW, CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import LoadedModel, load_quantized
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import ROLES, TOKEN_ROLES

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptaq, alpha 0 (sequential gptq)": ("gptaq", {"alpha": 0.0}),
    "gptaq, alpha 0.25": ("gptaq", {}),
    "gptaq, alpha 1": ("gptaq", {"alpha": 1.0}),
    "vlmq, gradient": ("vlmq", {}),
    "vlmq, modality": ("vlmq", {"token_weights": "modality"}),
}
ROUNDING_INPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn, int8 inputs": ("rtn", {"activation_format": "int8"}),
    "smoothquant": ("smoothquant", {}),
    "smoothquant, alpha 0.5": ("smoothquant", {"alpha": 0.5}),
    "smoothquant, fold": ("smoothquant", {"fold": True}),
}

Batches = list[dict[str, Any]]


def batches_of(loaded: LoadedModel, samples: int, seed: int) -> Batches:
    """Return samples with the roles of their positions."""
    spec = CalibrationSpec("self", samples=samples, seed=seed, degenerate=ALLOW)
    dialect = dialect_for(loaded.model.config.model_type)
    found, _ = build_batches(
        loaded.model, loaded.processor, spec, spec.load_samples(), dialect, keep_logits=True, by_role=True
    )
    return found


@torch.no_grad()
def logits_of(model: torch.nn.Module, batches: Batches) -> list[Tensor]:
    """Return the logits of each sample, (positions, vocabulary) float64."""
    found = []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in (TOKEN_ROLES, "logits_to_keep")}
        found.append(model(**inputs).logits[0].double())
    return found


def relative(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return ‖Z − Ẑ‖ / ‖Z‖ over all samples."""
    error = sum(float((one - other).square().sum()) for one, other in zip(exact, found, strict=True))
    return math.sqrt(error / sum(float(one.square().sum()) for one in exact))


def measure(dense: LoadedModel, calibration: Batches, unseen: Batches, bits: Sequence[int]) -> list[Row]:
    """Quantize with every method at every number of bits."""
    exact = logits_of(dense.model, unseen)
    # The position before an answer's token predicts it.
    answers = [(batch[TOKEN_ROLES] == ROLES.index("answer")).roll(-1) for batch in unseen]
    cases = [(count, label, *method) for count in bits for label, method in METHODS.items()]
    cases += [(8, label, *method) for label, method in ROUNDING_INPUTS.items()]
    rows: list[Row] = []
    for count, label, name, options in cases:
        model = copy.deepcopy(dense.model)
        integers = (
            {"group_size": -1, "symmetric": True} if name == "smoothquant" or options.get("activation_format") else {}
        )
        plan = QuantPlan.from_arguments(bits=count, **{"group_size": 64, **integers})
        data = None if name == "rtn" else calibration
        work = quantize(model, get(name, **options), plan, data)
        layers = [module.name for module in work.modules() if module.reason is None]
        rows.append(
            {"case": f"{count} bits, {label}", "bits": count, "method": label}
            | errors(dense, model, layers, unseen, exact, answers)
        )
        print(rows[-1], flush=True)
    for row in rows:
        base = next(each for each in rows if each["bits"] == row["bits"])
        row["ratio"] = base["answers"] / row["answers"]
    return rows


def errors(
    dense: LoadedModel,
    model: torch.nn.Module,
    layers: Sequence[str],
    unseen: Batches,
    exact: Sequence[Tensor],
    answers: Sequence[Tensor],
) -> Mapping[str, float]:
    """Return the errors of a quantized model."""
    found = logits_of(model, unseen)
    plain = [{key: value for key, value in batch.items() if key != TOKEN_ROLES} for batch in unseen]
    of_layers = [error for error in output_errors(dense.model, model, layers, plain).values() if error is not None]
    return {
        "answers": relative(
            [one[mask] for one, mask in zip(exact, answers, strict=True)],
            [one[mask] for one, mask in zip(found, answers, strict=True)],
        ),
        "all": relative(exact, found),
        "layers": math.sqrt(sum(error**2 for error in of_layers) / len(of_layers)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default=str(CHECKPOINT))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(machine())
    dense = load_quantized(given.pretrained, backend=get("none"), plan=QuantPlan(), dtype=torch.float32)
    calibration = batches_of(dense, given.samples, seed=0)
    rows = measure(dense, calibration, batches_of(dense, given.held_out, seed=1), given.bits)
    heads = ("bits", "method", "answers", "all", "layers")
    cells = [(str(row["bits"]), row["method"], *(f"{row[key]:.4f}" for key in heads[2:])) for row in rows]
    print("\n".join(markdown(heads, cells)))
    write(given.json, rows)


if __name__ == "__main__":
    main()
