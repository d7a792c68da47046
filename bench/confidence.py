"""What it costs to keep the log-probability of every token of an answer, and to write it down.

    python -m bench.confidence [--rows 1 8] [--repeats N] [--json FILE]

The baseline is `model.generate` of transformers on the same batch, which returns token ids and keeps nothing else; with
it, the ids are decoded. Ours is the whole way of a grounding answer: log-probabilities taken in every step, text split
among the tokens, and the `Response` encoded as a task reads it; `digits` adds how likely the other digits were at
every token of digits. Checkpoint and prompts are those of `bench.throughput` (640×480 photograph, 24 answer tokens),
but that it answers in digits alone, the most that there is to record. On a CPU it is the processor's time that counts.
A ratio is baseline over ours: 0.97 means that confidence costs 3 %.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.reporting import Row, interleaved, machine, write
from bench.shapes import write_checkpoint
from bench.throughput import ANSWER_TOKENS, SIZE, documents, ours
from lmms_plugin.protocol.response import Response
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.vlm.contracts.settings import GenerationSettings


def batch(vlm: Any, rows: int) -> dict[str, Any]:
    """Prompts about one photograph, as the model takes them."""
    docs = documents(1, rows)
    prompts = [vlm.reader.read(comprehension.doc_to_messages(docs[index]), f"bench/{index}") for index in range(rows)]
    inputs = vlm.chat.encode(prompts).inputs
    device = vlm.model.device
    return {
        name: value.to(device, vlm.model.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def only_digits(vlm: Any) -> None:
    """Leave the model no other tokens to choose."""
    weight = vlm.model.get_output_embeddings().weight
    digits = torch.tensor(vlm.responder.engine.decoder.number_tokens.ids, device=weight.device)
    kept = weight[digits].clone()
    weight.zero_()
    weight[digits] = kept


def with_confidence(vlm: Any, inputs: dict[str, Any], digits: bool) -> list[str]:
    """Encoded responses."""
    answers = vlm.responder.engine.decoder.generate(
        inputs, GenerationSettings(max_new_tokens=ANSWER_TOKENS), digits=digits
    )
    texts = ("".join(token.text for token in answer.tokens) for answer in answers)
    return [
        Response(text, answer.tokens, SIZE, SIZE, vlm.dialect.name, records_digits=digits).encode()
        for text, answer in zip(texts, answers, strict=True)
    ]


def without(vlm: Any, inputs: dict[str, Any]) -> list[str]:
    """Plain texts, by transformers alone."""
    ids = vlm.model.generate(
        **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=list(vlm.responder.engine.decoder.ends)
    )
    texts: list[str] = vlm.chat.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    return texts


def main() -> None:
    """Print the table and optionally write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(machine())
    cuda = torch.cuda.is_available()
    table: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_checkpoint(Path(folder))
        vlm = ours(Path(folder), "cuda" if cuda else "cpu", "bfloat16" if cuda else "float32")
        only_digits(vlm)
        for rows in options.rows:
            inputs = batch(vlm, rows)
            calls = {
                "confidence": lambda inputs=inputs: with_confidence(vlm, inputs, digits=False),
                "digits": lambda inputs=inputs: with_confidence(vlm, inputs, digits=True),
                "theirs": lambda inputs=inputs: without(vlm, inputs),
            }
            seconds = interleaved(calls, options.repeats, time.perf_counter if cuda else time.process_time)
            baseline = seconds.pop("theirs")
            for name, ours_seconds in seconds.items():
                row = {
                    "case": f"{name}@{rows}",
                    "ratio": baseline / ours_seconds,
                    "seconds": ours_seconds,
                    "baseline_seconds": baseline,
                }
                table.append(row)
                print(f"{row['case']:<14}{ours_seconds:8.3f} s{baseline:8.3f} s  ratio {row['ratio']:.3f}")
    write(options.json, table)


if __name__ == "__main__":
    main()
