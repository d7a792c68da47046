"""Processor time of answering with a quantized model over that of the model it came from.

    python -m bench.storage [--json FILE] [--bits 8 4 3 2] [--dtypes float32 bfloat16] [--repeats N]

The model is a random decoder of 100 M parameters in a LLaVA shell. Three shapes of work: 24 tokens written at batch 1
and at batch 8, and a prompt of 512 tokens read. The unquantized model and those quantized to each number of bits, with
`storage=packed` (all there was before weights could be kept dense) and `storage=auto`, take turns on one thread. Here
`ratio` is quantized over unquantized: 1 or below where quantization costs no time. The bound that is checked is 1.05,
for `auto`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.reporting import Row, machine, write
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.layers.weight_storage import settle
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.plans.storage_choice import Storage
from lmms_plugin.quant_backends.quantization import quantize

BOUND = 1.05
GROUP_SIZE = 64
STORAGES: tuple[Storage, ...] = ("packed", "auto")
SHAPES = {"decode 24, batch 1": (1, 16, 24), "decode 24, batch 8": (8, 16, 24), "prompt 512": (1, 512, 1)}
"""Name -> rows, tokens of the prompt, tokens written."""


def decoder(dtype: torch.dtype) -> Any:
    """Return the random model: 20 blocks of hidden size 576 and an embedding of 16,384 tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=8191, tie_word_embeddings=True)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


@torch.inference_mode()
def work(model: Any, rows: int, prompt: int, written: int) -> None:
    """Read a prompt and write tokens, greedily."""
    ids = torch.arange(rows * prompt).view(rows, prompt) % 8000
    mask = torch.ones_like(ids)
    if written == 1:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1)
        return
    options = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=mask, **options)


def least(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least processor seconds of each call; they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def held(dense: Any, bits: int, storage: Storage, folder: Path) -> tuple[Any, str]:
    """Return a quantized copy of a model, held as said, and what its layers run on."""
    model = copy.deepcopy(dense)
    quantize(model, get("rtn"), QuantPlan.from_arguments(bits=bits, group_size=GROUP_SIZE))
    return model, "; ".join(sorted({one.kernel for one in settle(model, storage, folder=folder).values()}))


def measure(dtype: str, several: Sequence[int], repeats: int, folder: Path) -> list[Row]:
    """Return and print a row for each shape of work, number of bits and storage."""
    dense = decoder(getattr(torch, dtype))
    models: dict[str, tuple[Any, str]] = {"unquantized": (dense, "")}
    for bits, storage in product(several, STORAGES):
        models[f"{bits} bits, {storage}"] = held(dense, bits, storage, folder)
    for model, _ in models.values():
        work(model, 1, 4, 1)
    rows: list[Row] = []
    for shape, sizes in SHAPES.items():
        seconds = least({name: partial(work, model, *sizes) for name, (model, _) in models.items()}, repeats)
        plain = seconds.pop("unquantized")
        for name, taken in seconds.items():
            row: Row = {
                "case": f"{dtype}, {shape}, {name}",
                "ratio": taken / plain,
                "seconds": taken,
                "unquantized_seconds": plain,
                "runs_on": models[name][1],
                "within_bound": taken <= BOUND * plain,
            }
            rows.append(row)
            print(f"{dtype:<9} {shape:<19} {name:<15}{row['ratio']:>6.2f}  {row['runs_on']}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtypes:
            rows += measure(dtype, arguments.bits, arguments.repeats, Path(folder))
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
