"""Our AWQ and GPTQ beside llm-compressor's: same layers, same calibration inputs, same bits and groups.

    python -m bench.quantizer_references [--environment FOLDER] [--samples N] [--json FILE]

llm-compressor pins versions of torch and transformers that this package cannot be installed with, so that it runs in an
environment of its own, which is made on first use (5 GB; about two minutes with a quick connection).

Two models, both Llamas: the embedded demo's language model, trained, on the image and text embeddings of demo scenes;
and one made up so that its layers are hard: correlated channels, a few of them tens of times larger than the others,
with heavy-tailed values. Both sides see the unquantized model's activations. An error is ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ of one
layer, on the calibration inputs and on as many others; a case's is the root mean square over layers. Ratios are ours /
theirs, below 1 where ours is nearer. `model` is the ratio of the errors of the last hidden state with all layers
replaced at once.

llm-compressor's AWQ chooses its scales by the error of a whole attention or MLP, ours by that of the layers that share
an input: layer by layer this favours ours, which is what the column `model` is for.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from bench.reporting import Row, machine, write
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics, squared_errors

LLM_COMPRESSOR = "llmcompressor==0.14.0.1"
WORKER = Path(__file__).with_name("llm_compressor_worker.py")
ENVIRONMENT = Path.home() / ".cache" / "lmms_plugin" / LLM_COMPRESSOR.replace("==", "-")
LIMIT = 1.05
"""Largest ratio of a case's errors that counts as no worse."""

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq": ("gptq", {"act_order": True}, {"actorder": "static"}),
    "gptq in order": ("gptq", {"act_order": False}, {"actorder": None}),
    "awq": ("awq", {}, {"duo_scaling": True}),
    "awq, inputs only": ("awq", {}, {"duo_scaling": False}),
}
"""Row of the table -> backend, our options, theirs. llm-compressor's defaults are static order and duo scaling."""

Inputs = list[Tensor]
Weights = dict[str, Tensor]


class Case(NamedTuple):
    """One comparison."""

    method: str
    bits: int
    group_size: int
    symmetric: bool


CASES = [
    Case(method, bits, group_size, symmetric)
    for method in METHODS
    for bits in (4, 3)
    for group_size in (128, 64)
    # GPTQ is mostly used with symmetric grids, AWQ with asymmetric ones.
    for symmetric in ((True, False) if method == "gptq" else (method.startswith("gptq"),))
]


def demo_model(samples: int) -> tuple[LlamaForCausalLM, Inputs]:
    """The demo's language model alone, and twice `samples` sequences of embeddings that it was fed."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lmms_plugin.demo import CHECKPOINT
    from lmms_plugin.protocol.dialects import dialect_for
    from lmms_plugin.quant_backends.calibration.inputs import build_batches
    from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec

    whole = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
    spec = CalibrationSpec("demo", samples=2 * samples)
    batches, _ = build_batches(
        whole,
        AutoProcessor.from_pretrained(CHECKPOINT),
        spec,
        spec.load_samples(),
        dialect_for("idefics3", "demo"),
        keep_logits=False,
    )
    inputs: Inputs = []
    language = whole.model.text_model
    language.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs["inputs_embeds"]), with_kwargs=True)
    for batch in batches:
        whole(**batch)
    model = LlamaForCausalLM(whole.config.text_config).eval()
    model.model.load_state_dict(language.state_dict())
    return model, inputs


def hard_model(samples: int) -> tuple[LlamaForCausalLM, Inputs]:
    """A Llama of one layer, 512 wide, with heavy-tailed, correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data = torch.randn(512, generator=generator).exp()
            parameter.data[torch.randperm(512, generator=generator)[:6]] *= 30
        elif parameter.ndim == 2:
            # Student's t with five degrees of freedom, heavier in its tails than a normal distribution.
            chi = torch.randn(5, *parameter.shape, generator=generator).square().mean(0).sqrt()
            parameter.data = torch.randn(parameter.shape, generator=generator) / chi / parameter.shape[1] ** 0.5
    mixing = torch.randn(64, 512, generator=generator) / 8

    def sample() -> Tensor:
        causes = torch.randn(1, 128, 64, generator=generator) ** 3
        return causes @ mixing + 0.3 * torch.randn(1, 128, 512, generator=generator)

    return model, [sample() for _ in range(2 * samples)]


MODELS: dict[str, Callable[[int], tuple[LlamaForCausalLM, Inputs]]] = {"demo": demo_model, "hard": hard_model}


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers but the output projection."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and name != "lm_head"}


def gather(model: LlamaForCausalLM, inputs: Inputs) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every layer in the unquantized model; one object for layers fed the same tensor."""
    layers = layers_of(model)
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(re.sub("[kv]_proj", "q_proj", name).replace("up_proj", "gate_proj"), []).append(name)
    found = {}
    for leader, names in groups.items():
        columns = layers[leader].in_features
        magnitude = torch.zeros(columns, dtype=torch.float64)
        found[leader] = InputStatistics(tuple(names), torch.zeros(columns, columns), magnitude)
    hooks = [
        layers[leader].register_forward_pre_hook(lambda _, args, entry=entry: entry.add(args[0]))
        for leader, entry in found.items()
    ]
    for embeds in inputs:
        model(inputs_embeds=embeds)
    for hook in hooks:
        hook.remove()
    return found


def ours(model: LlamaForCausalLM, case: Case, statistics: dict[str, InputStatistics]) -> Weights:
    """Weights that our backend's layers stand for."""
    name, options, _ = METHODS[case.method]
    backend: Any = get(name, **options)
    layers, spec = layers_of(model), QuantSpec(case.bits, case.group_size, case.symmetric)
    found: Weights = {}
    for entry in statistics.values():
        solutions = backend.solve([layers[each] for each in entry.names], [spec] * len(entry.names), entry)
        found |= {each: solution.layer.weight for each, solution in zip(entry.names, solutions, strict=True)}
    return found


def rounded(model: LlamaForCausalLM, case: Case) -> Weights:
    """Round-to-nearest on the same grids."""
    spec = QuantSpec(case.bits, case.group_size, case.symmetric)
    return {
        name: round_by_blocks(layer.weight, spec).dequantize(case.bits, torch.float32)[:, : layer.in_features]
        for name, layer in layers_of(model).items()
    }


def output_errors(model: LlamaForCausalLM, found: Weights, statistics: dict[str, InputStatistics]) -> dict[str, float]:
    """‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ of every layer."""
    layers = layers_of(model)
    errors = {}
    for entry in statistics.values():
        for name in entry.names:
            weight = layers[name].weight
            squared = squared_errors(found[name] - weight, entry.gram).sum() / squared_errors(weight, entry.gram).sum()
            errors[name] = float(squared) ** 0.5
    return errors


def hidden_states(model: LlamaForCausalLM, inputs: Inputs, replaced: Weights | None = None) -> Tensor:
    """Last hidden states of all samples, (tokens, hidden), with some weights replaced for the time of the call."""
    layers = layers_of(model)
    kept = {name: layers[name].weight.data for name in replaced or {}}
    for name, weight in (replaced or {}).items():
        layers[name].weight.data = weight
    states = torch.cat([model.model(inputs_embeds=embeds).last_hidden_state[0] for embeds in inputs])
    for name, weight in kept.items():
        layers[name].weight.data = weight
    return states


def environment(folder: Path) -> Path:
    """The Python of an environment with llm-compressor in it, made where there is none yet."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {LLM_COMPRESSOR} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", LLM_COMPRESSOR], check=True)
    return python


def theirs(python: Path, model: LlamaForCausalLM, inputs: Inputs, cases: list[Case]) -> Iterator[Weights]:
    """Weights that llm-compressor's layers stand for, case by case.

    Raises:
        RuntimeError: It failed, or with these weights our model does not compute what its model computed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "checkpoint")
        save_file({f"{i:05}": embeds.contiguous() for i, embeds in enumerate(inputs)}, folder / "inputs.safetensors")
        jobs = []
        for number, case in enumerate(cases):
            method, _, options = METHODS[case.method]
            output = str(folder / f"{number}.safetensors")
            jobs.append(case._asdict() | {"method": method, "options": options, "output": output})
        job = {"checkpoint": str(folder / "checkpoint"), "inputs": str(folder / "inputs.safetensors"), "cases": jobs}
        (folder / "job.json").write_text(json.dumps(job))
        command = [str(python), str(WORKER), str(folder / "job.json")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"llm-compressor failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        for entry in jobs:
            found = load_file(entry["output"])
            expected = found.pop("last_hidden_state")
            states = hidden_states(model, inputs[:1], found)
            if not torch.allclose(states, expected, rtol=1e-3, atol=1e-3 * float(expected.std())):
                raise RuntimeError(f"these weights are not those of llm-compressor's model: {entry}")
            yield found


def mean(errors: dict[str, float]) -> float:
    """Root mean square over layers."""
    return (sum(error**2 for error in errors.values()) / len(errors)) ** 0.5


def compare(name: str, python: Path, samples: int) -> Iterator[Row]:
    """All cases on one model; ratios of errors are ours / theirs here, as in the table."""
    model, inputs = MODELS[name](samples)
    calibration, held_out = inputs[:samples], inputs[samples:]
    statistics, others = gather(model, calibration), gather(model, held_out)
    exact = hidden_states(model, calibration)
    for case, reference in zip(CASES, theirs(python, model, calibration, CASES), strict=True):
        own = ours(model, case, statistics)
        found = {"ours": own, "theirs": reference, "rtn": rounded(model, case)}
        errors = {who: output_errors(model, weights, statistics) for who, weights in found.items()}
        elsewhere = {who: mean(output_errors(model, weights, others)) for who, weights in found.items()}
        states = {who: hidden_states(model, calibration, weights) for who, weights in found.items()}
        whole = {who: float((changed - exact).norm() / exact.norm()) for who, changed in states.items()}
        ratios = {layer: errors["ours"][layer] / errors["theirs"][layer] for layer in own}
        yield {
            "case": f"{name}, {case.method}",
            "inputs": name,
            **case._asdict(),
            **{who: mean(errors[who]) for who in found},
            "ratio": mean(errors["ours"]) / mean(errors["theirs"]),
            "worst_layer": max(ratios.values()),
            "held_out": elsewhere["ours"] / elsewhere["theirs"],
            "model": whole["ours"] / whole["theirs"],
            "layers": {layer: {who: errors[who][layer] for who in found} for layer in own},
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="with llm-compressor, or to be made")
    parser.add_argument("--samples", type=int, default=16, help="for calibration, and as many others")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path, help="write everything, layer by layer, to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    python = environment(arguments.environment)
    print(machine())
    print(f"{'inputs':6} {'method':16} {'bits':>4} {'group':>5} {'grid':4} {'rtn':>7} {'theirs':>7}", end="")
    print(f" {'ours':>7} {'ratio':>6} {'worst layer':>11} {'held out':>8} {'model':>6}")
    rows = []
    with torch.no_grad():
        for name in arguments.models:
            for row in compare(name, python, arguments.samples):
                rows.append(row)
                grid = "sym" if row["symmetric"] else "asym"
                print(f"{name:6} {row['method']:16} {row['bits']:4} {row['group_size']:5} {grid:4}", end="")
                print(f" {row['rtn']:7.4f} {row['theirs']:7.4f} {row['ours']:7.4f} {row['ratio']:6.3f}", end="")
                print(f" {row['worst_layer']:11.3f} {row['held_out']:8.3f} {row['model']:6.3f}", flush=True)
    write(arguments.json, rows)
    above = sum(row["ratio"] > LIMIT for row in rows)
    print(f"{len(rows)} cases, {above} with a ratio above {LIMIT}")


if __name__ == "__main__":
    main()
