"""Expressions per second of grounding evaluation, by the number of expressions per image.

    python -m bench.throughput [--expressions 1 3 7 14] [--images N] [--auto-images N] [--repeats N] [--threads N]
                               [--shape small|3b|tiny] [--device D] [--dtype D] [--ways ...] [--profile] [--json FILE]

Ways through the same documents, in one process and taking turns: our model with batch_size=1 (`shared`); with
batch_size=auto (`auto`), which is the default and packs images, so that it is given more of them; with
static_cache=True (`static`, only if asked for); with share_prefix=False (`plain`); and lmms-eval's own `qwen2_5_vl`
with its default batch of one (`lmms_eval`, which needs `decord`). What is compared is seconds per expression: on a CPU
with one thread the processor's, background threads included. The checkpoint is a Qwen2.5-VL of random weights
(`bench/shapes.py`): by default of about 100 million parameters, whose vision tower takes about as much of a prompt's
arithmetic as in the model of 3 billion, which `--shape 3b` has the sizes of. Documents are RefCOCO+ rows with JPEG
photographs of 640×480, decoded and asked about anew each time, in the generic words that every model gets; answers are
24 tokens long. All use one precision (lmms-eval's wrapper loads bfloat16 and is converted).

A ratio above 1 means that ours is faster. `same` counts equal answers. lmms-eval's wrapper has qwen_vl_utils resize the
photograph with Pillow before the processor sees it, ours leaves that to the processor (torchvision): pixels differ by a
level here and there, and a random model answers otherwise. With ``--size 644 476``, where nothing is resized, all
answers are equal.

`floor` is the share that the arithmetic of our answers (counted by torch, matrix products and attention) takes at least
of the time of `auto`, at the rate which this machine reaches in a large matrix product. `fewer_operations` is how many
times more arithmetic lmms-eval's wrapper does: the ratio that equally fast arithmetic gives. `ceiling` is the ratio
that `auto` would have if it took nothing but its floor. `--profile` adds the share of each phase in the time of `auto`,
and how much of the phase is floor.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench.decode import clock_of
from bench.phases import phases
from bench.reporting import Row, interleaved, machine, write
from bench.shapes import SHAPES, written
from lmms_plugin.quant_backends.layers.dense_products import DenseProducts
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs

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
WAYS = ("shared", "auto", "static", "plain", "lmms_eval")
BASELINES = ("plain", "lmms_eval")


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
    """Our model without quantization; one image at a time unless asked otherwise."""
    from lmms_plugin.vlm.wrapper import QuantizedVLM

    arguments = {"pretrained": str(checkpoint), "device": device, "dtype": dtype, "batch_size": 1} | arguments
    # Loading is no part of what is timed.
    return QuantizedVLM(**arguments).make_ready()


def theirs(checkpoint: Path, device: str, dtype: str) -> Any:
    """lmms-eval's wrapper, in our precision; None where it cannot be imported."""
    missing = [name for name in ("decord", "qwen_vl_utils") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"lmms-eval's qwen2_5_vl is left out: {', '.join(missing)} not installed")
        return None
    try:
        from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL

        wrapper = Qwen2_5_VL(pretrained=str(checkpoint), device=device, device_map=device, min_pixels=56 * 56)
    except Exception as error:
        # With other versions of what it requires; our own ways are measured all the same.
        print(f"lmms-eval's qwen2_5_vl is left out: {type(error).__name__}: {error}")
        return None
    wrapper._model = wrapper._model.to(getattr(torch, dtype))
    return wrapper


def run(
    model: Any, docs: ExpressionDocs, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, int | None, Answers]:
    """Return seconds, peak bytes on the GPU (other models' left out; None on a CPU) and answers of one pass."""
    model.task_dict = {"bench": {"test": docs}}
    gc.collect()
    cuda = next(model.model.parameters()).is_cuda
    others = 0
    if cuda:
        others = torch.cuda.memory_allocated() - bytes_on_gpu(model.model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    found = model.generate_until(requests(docs))
    if cuda:
        torch.cuda.synchronize()
    seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() - others if cuda else None
    return seconds, peak, [getattr(answer, "text", answer) for answer in found]


def bytes_on_gpu(model: torch.nn.Module) -> int:
    """Bytes of a model's own tensors there: codes may lie in host memory, beside dense weights that are no buffers."""
    kept = [layer.kept for layer in model.modules() if isinstance(layer, DenseProducts)]
    tensors = (*model.parameters(), *model.buffers(), *(weight for weight in kept if weight is not None))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_cuda)


def operations(model: Any, docs: ExpressionDocs) -> float:
    """Floating-point operations of one pass: matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run(model, docs)
    return float(counter.get_total_flops())


def seconds_per_operation(model: Any, clock: Callable[[], float]) -> float:
    """Least seconds of an operation: in a large matrix product, in the precision and on the device of a model."""
    parameter = next(model.model.parameters())
    size = 8192 if parameter.is_cuda else 2048
    one = torch.randn(size, size, dtype=parameter.dtype, device=parameter.device)

    def product() -> None:
        torch.mm(one, one)
        if one.is_cuda:
            torch.cuda.synchronize()

    return interleaved({"product": product}, repeats=5, clock=clock)["product"] / (2 * size**3)


class Way(NamedTuple):
    """A way through the documents.

    Attributes:
        make: What loads its model; None where that cannot be imported.
        images: Number of images it is given.
    """

    make: Callable[[], Any]
    images: int


class Timed(NamedTuple):
    """What a way took.

    Attributes:
        per_expression: Median seconds per expression.
        seconds: Seconds of each pass.
        peak: Peak bytes on the GPU; None on a CPU.
        answers: Answers of the last pass.
    """

    per_expression: float
    seconds: list[float]
    peak: int | None
    answers: Answers


def timed(
    models: Mapping[str, Any], docs: Mapping[str, ExpressionDocs], repeats: int, clock: Callable[[], float]
) -> dict[str, Timed]:
    """Let all models take turns over their documents."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    last: dict[str, tuple[int | None, Answers]] = {}
    for _ in range(repeats):
        for name, model in models.items():
            took, *last[name] = run(model, docs[name], clock)  # type: ignore[assignment]
            seconds[name].append(took)
    return {
        name: Timed(statistics.median(times) / len(docs[name]), times, *last[name]) for name, times in seconds.items()
    }


def measure(
    models: Mapping[str, Any],
    images: Mapping[str, int],
    expressions: int,
    repeats: int,
    size: tuple[int, int],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """All ways, interleaved; one row per way of ours and way that it is compared with, then floor and ceiling.

    A way with fewer images than another has the first of the other's.
    """
    docs = {name: documents(images[name], expressions, size) for name in models}
    found = timed(models, docs, repeats, clock)
    baselines = [name for name in BASELINES if name in models]
    rows = [_row(way, name, found, expressions) for way in models if way not in BASELINES for name in baselines]
    if not baselines:
        rows = [{"case": f"{way}@{expressions}", "ratio": None, **_account(one)} for way, one in found.items()]
    if "auto" in models:
        each = operations(models["auto"], docs["auto"]) / len(docs["auto"])
        # Questions of lmms-eval's wrapper are about equally long, and each is computed by itself.
        alone = operations(models["lmms_eval"], documents(1, 1, size)) if "lmms_eval" in models else None
        least = seconds_per_operation(models["auto"], clock)
        rows += bounds({name: one.per_expression for name, one in found.items()}, each, alone, least, expressions)
    return rows


def _account(one: Timed) -> Row:
    return {"expressions_per_s": 1 / one.per_expression, "seconds": one.seconds, "peak_bytes": one.peak}


def _row(way: str, name: str, found: Mapping[str, Timed], expressions: int) -> Row:
    ours, theirs = found[way], found[name]
    return {
        "case": f"{'' if way == 'shared' else way + '_'}vs_{name}@{expressions}",
        "ratio": theirs.per_expression / ours.per_expression,
        **_account(ours),
        **{f"baseline_{key}": value for key, value in _account(theirs).items()},
        "same": sum(a == b for a, b in zip(ours.answers, theirs.answers, strict=False)),
        "expressions": min(len(ours.answers), len(theirs.answers)),
    }


def bounds(
    per_expression: Mapping[str, float], each: float, alone: float | None, least: float, expressions: int
) -> list[Row]:
    """The share of the floor that `auto` reaches, and the greatest ratios to lmms-eval's wrapper that are possible.

    Args:
        per_expression: Seconds per expression of every way.
        each: Operations per expression of `auto`.
        alone: Operations of a question by itself; None without lmms-eval's wrapper.
        least: Least seconds of an operation.
        expressions: Number per image, for the names of the rows.

    Returns:
        `floor`; `fewer_operations`, the ratio if both computed equally fast; `ceiling`, the ratio if `auto` took
        nothing but its floor.
    """
    floor = each * least
    took = per_expression["auto"]
    rows: list[Row] = [{"case": f"floor@{expressions}", "ratio": floor / took, "seconds": took, "operations": each}]
    if alone is not None:
        rows += [
            {"case": f"fewer_operations@{expressions}", "ratio": alone / each, "baseline_operations": alone},
            {"case": f"ceiling@{expressions}", "ratio": per_expression["lmms_eval"] / floor},
        ]
    return rows


def show(row: Row) -> str:
    """A row as a line of the table."""
    if "expressions_per_s" not in row:
        told = f"{row['ratio']:>28.2f}" if row["ratio"] is not None else f"{'':>28}"
        return f"{row['case']:<24}{told}" + (f"{row['share']:>8.0%} of the time" if "share" in row else "")
    if "baseline_expressions_per_s" not in row:
        return f"{row['case']:<24}{row['expressions_per_s']:>10.3f}"
    return (
        f"{row['case']:<24}{row['expressions_per_s']:>10.3f}{row['baseline_expressions_per_s']:>10.3f}"
        f"{row['ratio']:>8.2f}{row['same']:>6}/{row['expressions']}"
    )


def ways(folder: Path, options: argparse.Namespace) -> dict[str, Way]:
    """All ways by their names."""

    def own(images: int, **arguments: Any) -> Way:
        return Way(lambda: ours(folder, options.device, options.dtype, **arguments), images)

    few = options.images
    return {
        "shared": own(few),
        "auto": own(max(few, options.auto_images), batch_size="auto"),
        "static": own(few, static_cache=True),
        "plain": own(few, share_prefix=False),
        "lmms_eval": Way(lambda: theirs(folder, options.device, options.dtype), few),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expressions", type=int, nargs="+", default=[1, 3, 7, 14])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--auto-images", type=int, default=8, help="of the way `auto`, which packs them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="bfloat16 on a GPU by default, else float32")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder with a checkpoint of that shape; written if it is empty"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[name for name in WAYS if name != "static"])
    parser.add_argument("--size", type=int, nargs=2, default=SIZE)
    parser.add_argument("--profile", action="store_true", help="also where the time of `auto` goes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and optionally write it as JSON, after each number of expressions."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock = clock_of(options.device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = written(options.checkpoint or Path(temporary), SHAPES[options.shape], options.device)
        wanted = {name: way for name, way in ways(folder, options).items() if name in options.ways}
        models = {name: model for name, way in wanted.items() if (model := way.make()) is not None}
        images = {name: wanted[name].images for name in models}
        for model in models.values():
            run(model, documents(1, 2))
        parameters = sum(parameter.numel() for parameter in next(iter(models.values())).model.parameters())
        print(f"{parameters / 1e6:.0f} M parameters, {options.dtype}, {images} images; {machine()}")
        print(f"{'case':<24}{'ours/s':>10}{'theirs/s':>10}{'ratio':>8}{'same':>10}", flush=True)
        for expressions in options.expressions:
            found = measure(models, images, expressions, options.repeats, tuple(options.size), clock)
            if options.profile and "auto" in models:
                docs = documents(images["auto"], expressions, tuple(options.size))
                least = seconds_per_operation(models["auto"], clock)
                found += phases(models["auto"], partial(run, models["auto"], docs), expressions, clock, least)
            rows += found
            print("\n".join(map(show, found)), flush=True)
            write(options.json, rows)


if __name__ == "__main__":
    main()
