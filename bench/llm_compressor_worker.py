"""The part of `bench.quantizer_references` that runs where llm-compressor is installed: it imports nothing of ours.

    PYTHON bench/llm_compressor_worker.py JOB.json

The job names a checkpoint of a Llama, a file of input embeddings (one tensor per sample), and cases. For each case the
weights that the quantized layers stand for are written to a safetensors file, in terms of the unquantized model: scales
that AWQ moved into the layer before are taken back. Beside them, under `CHECK`, lie the last hidden states of the first
sample as the quantized model itself computes them.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# AWQ pins host memory, which takes a GPU.
IntermediatesCache._pin_intermediate = classmethod(lambda cls, intermediate: None)


CHECK = "last_hidden_state"

SCALES: list[tuple[list[str], str, torch.Tensor]] = []
"""What AWQ did in the case at hand: layers whose columns were scaled, the layer before them, by what."""


class RecordingAwq(AWQModifier):
    """AWQ that notes its scales."""

    def _compute_best_scale(self, mapping, *arguments):
        scales = super()._compute_best_scale(mapping, *arguments)
        SCALES.append((mapping.balance_names, mapping.smooth_name, scales))
        return scales


def recipe(case):
    """The modifiers of one case."""
    weights = {
        "num_bits": case["bits"],
        "type": "int",
        "symmetric": case["symmetric"],
        "strategy": "group",
        "group_size": case["group_size"],
    }
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if case["method"] == "gptq":
        return [GPTQModifier(**scheme, **case["options"])]
    return [RecordingAwq(**case["options"]), QuantizationModifier(**scheme)]


def run(job, case):
    """Quantize the checkpoint and return {layer: effective weight}, and the hidden states."""
    model = LlamaForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32)
    model.config.use_cache = False
    samples = [{"inputs_embeds": embeds} for embeds in load_file(job["inputs"]).values()]
    SCALES.clear()
    oneshot(
        model=model,
        recipe=recipe(case),
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, "?")), pad_token="?"),
        dataset=DataLoader(samples, batch_size=1, collate_fn=lambda batch: batch[0]),
        num_calibration_samples=len(samples),
        # All layers are calibrated on what the unquantized model feeds them, as ours are here.
        pipeline="basic",
    )
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    found = {}
    for name, module in layers.items():
        found[name] = forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights).detach()
    for balanced, smooth, scales in SCALES:
        for name in balanced:
            found[name] = found[name] / scales
        if smooth in found:
            found[smooth] = found[smooth] * scales.unsqueeze(1)
    found[CHECK] = model.model(**samples[0]).last_hidden_state[0]
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def main():
    """Run the cases of a job."""
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    for case in job["cases"]:
        with torch.no_grad():
            save_file(run(job, case), case["output"])


if __name__ == "__main__":
    main()
