"""Expressions per second of grounding evaluation, by the number of expressions per image.

    python -m bench.throughput [--expressions 1 3 7 14] [--images N] [--repeats N] [--threads N] [--size W H]
                               [--json FILE]

Ways through the same documents, in one process and interleaved: our model as it comes (`shared`), our model with
share_prefix=False (`plain`), and lmms-eval's own `qwen2_5_vl` (`lmms_eval`, which needs `decord`). The checkpoint is a
Qwen2.5-VL of random weights, of about 100 million parameters, whose vision tower takes about as much of a prompt's
arithmetic as in the model of 3 billion. Documents are RefCOCO+ rows with JPEG photographs of 640×480, decoded and asked
about anew each time, in the generic words that every model gets; answers are 24 tokens long. All use one precision
(lmms-eval's wrapper loads bfloat16 and is converted) and batch_size=1, lmms-eval's default; cases that begin with
`auto` are our model with batch_size=auto against the others as before.

A ratio above 1 means that ours is faster. `same` counts equal answers. lmms-eval's wrapper has qwen_vl_utils resize the
photograph with Pillow before the processor sees it, ours leaves that to the processor (torchvision): pixels differ by a
level here and there, and a random model answers otherwise. With ``--size 644 476``, where nothing is resized, all
answers are equal.

`floor` is the least time that the arithmetic of our answers (counted by torch, matrix products and attention) could
take at the rate which this machine reaches in a matrix product of 2048; its ratio is the share of it in the time taken.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench.reporting import Row, interleaved, machine, write
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.families import BUILDERS, widen

ANSWER_TOKENS = 24
SIZE = (640, 480)
WORDS = (
    "man",
    "woman",
    "dog",
    "red",
    "blue",
    "striped",
    "shirt",
    "umbrella",
    "tall",
    "holding",
    "small",
    "horse",
    "the",
)
Answers = list[str]


def write_checkpoint(folder: Path) -> int:
    """Write the random checkpoint; return its number of parameters."""
    from transformers import AutoModelForImageTextToText

    config, processor = BUILDERS["qwen2_5_vl"]()
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 768, 2048, 12, 16384
    text.num_attention_heads, text.num_key_value_heads = 12, 2
    text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [8, 12, 12]}
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 10, 384, 1024, 6
    vision.out_hidden_size, vision.window_size, vision.fullatt_block_indexes = 768, 112, [4, 9]
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    widen(model)
    # Answers of one length make times comparable, and of ordinary tokens alone they can be compared.
    ordinary = min(processor.tokenizer.all_special_ids)
    model.get_output_embeddings().weight.data[ordinary:] = 0
    # lmms-eval's wrapper reads every checkpoint as bfloat16; written so, all read the same weights.
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def documents(images: int, expressions: int, size: tuple[int, int] = SIZE, seed: int = 0) -> ExpressionDocs:
    """RefCOCO+ rows over photographs that compress and resize like real ones."""
    rng = np.random.default_rng([expressions, seed] if seed else expressions)
    rows = []
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=92)
        rows.append(
            {
                "question_id": str(number),
                "image": {"bytes": buffer.getvalue(), "path": None},
                "answer": [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(expressions)],
                "bbox": [10.0, 10.0, 100.0, 100.0],
                "file_name": f"COCO_train2014_{number:012d}_0.jpg",
            }
        )
    features = datasets.Features(
        {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.List(datasets.Value("string")),
            "bbox": datasets.List(datasets.Value("float32")),
            "file_name": datasets.Value("string"),
        }
    )
    return ExpressionDocs(datasets.Dataset.from_list(rows, features=features))


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The task's messages without the wish for our own dialect, so that all models read the same words."""
    return [{key: value for key, value in m.items() if key != "grounding"} for m in comprehension.doc_to_messages(doc)]


def requests(docs: ExpressionDocs) -> list[Instance]:
    """What lmms-eval hands to a chat model."""
    options = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "until": []}
    return [
        Instance(
            "generate_until",
            ("", messages, dict(options), index, "bench", "test"),
            0,
            metadata={"task": "bench", "doc_id": index, "repeats": 1},
        )
        for index in range(len(docs))
    ]


def ours(checkpoint: Path, device: str, dtype: str, **arguments: Any) -> Any:
    """Our model without quantization."""
    from lmms_plugin.vlm.wrapper import QuantizedVLM

    vlm = QuantizedVLM(pretrained=str(checkpoint), device=device, dtype=dtype, **arguments)
    # Loading is no part of what is timed.
    _ = vlm.responder
    return vlm


def theirs(checkpoint: Path, device: str, dtype: str) -> Any:
    """lmms-eval's wrapper, in our precision; None where it cannot be imported."""
    missing = [name for name in ("decord", "qwen_vl_utils") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"lmms-eval's qwen2_5_vl is left out: {', '.join(missing)} not installed")
        return None
    from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

    wrapper = Qwen2_5_VL(pretrained=str(checkpoint), device=device, device_map=device, min_pixels=56 * 56)
    wrapper._model = wrapper._model.to(getattr(torch, dtype))
    return wrapper


def run(model: Any, docs: ExpressionDocs) -> tuple[float, int | None, Answers]:
    """Return seconds, peak bytes on the GPU (other models' left out; None on a CPU) and answers of one pass."""
    model.task_dict = {"bench": {"test": docs}}
    gc.collect()
    tensors = [*model.model.parameters(), *model.model.buffers()]
    cuda = tensors[0].is_cuda
    others = 0
    if cuda:
        others = torch.cuda.memory_allocated() - sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = model.generate_until(requests(docs))
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - others if cuda else None
    return seconds, peak, [getattr(answer, "text", answer) for answer in found]


def floor_seconds(model: Any, docs: ExpressionDocs) -> float:
    """Least time for the arithmetic of one pass at the rate of a large matrix product."""
    with FlopCounterMode(display=False) as counter:
        run(model, docs)
    size, parameter = 2048, next(model.model.parameters())
    one = torch.randn(size, size, dtype=parameter.dtype, device=parameter.device)

    def product() -> None:
        torch.mm(one, one)
        if one.is_cuda:
            torch.cuda.synchronize()

    seconds = interleaved({"product": product}, repeats=5)["product"]
    return float(counter.get_total_flops()) * seconds / (2 * size**3)


def measure(models: dict[str, Any], images: int, expressions: int, repeats: int, size: tuple[int, int]) -> list[Row]:
    """All ways over the same documents, interleaved; one row per way that ours is compared with."""
    docs = documents(images, expressions, size)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    answers: dict[str, Answers] = {}
    peaks: dict[str, int | None] = {}
    for _ in range(repeats):
        for name, model in models.items():
            took, peaks[name], answers[name] = run(model, docs)
            seconds[name].append(took)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    floor = floor_seconds(models["auto"], docs)
    rows: list[Row] = [
        {
            "case": f"{'auto_' * (way == 'auto')}vs_{name}@{expressions}",
            "ratio": median[name] / median[way],
            "expressions_per_s": len(docs) / median[way],
            "baseline_expressions_per_s": len(docs) / median[name],
            "same": sum(a == b for a, b in zip(answers[way], answers[name], strict=True)),
            "expressions": len(docs),
            "seconds": seconds[way],
            "baseline_seconds": seconds[name],
            "peak_bytes": peaks[way],
            "baseline_peak_bytes": peaks[name],
        }
        for way in ("shared", "auto")
        for name in models
        if name not in ("shared", "auto")
    ]
    of_auto = {"ratio": floor / median["auto"], "seconds": median["auto"], "baseline_seconds": floor}
    return [*rows, {"case": f"floor@{expressions}", **of_auto}]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expressions", type=int, nargs="+", default=[1, 3, 7, 14])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=2, default=SIZE)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(Path(folder))
        makers: dict[str, Callable[[], Any]] = {
            "shared": lambda: ours(Path(folder), options.device, dtype),
            "auto": lambda: ours(Path(folder), options.device, dtype, batch_size="auto"),
            "plain": lambda: ours(Path(folder), options.device, dtype, share_prefix=False),
            "lmms_eval": lambda: theirs(Path(folder), options.device, dtype),
        }
        models = {name: model for name, make in makers.items() if (model := make()) is not None}
        for model in models.values():
            run(model, documents(1, 2))
        print(f"{parameters / 1e6:.0f} M parameters, {dtype}, {options.images} images; {machine()}")
        print(f"{'case':<22}{'ours/s':>10}{'theirs/s':>10}{'ratio':>8}{'same':>10}")
        for expressions in options.expressions:
            for row in measure(models, options.images, expressions, options.repeats, tuple(options.size)):
                rows.append(row)
                if row["case"].startswith("floor"):
                    print(f"{row['case']:<22}{row['ratio']:>28.2f}", flush=True)
                    continue
                print(
                    f"{row['case']:<22}{row['expressions_per_s']:>10.3f}{row['baseline_expressions_per_s']:>10.3f}"
                    f"{row['ratio']:>8.2f}{row['same']:>6}/{row['expressions']}",
                    flush=True,
                )
    write(options.json, rows)


if __name__ == "__main__":
    main()
