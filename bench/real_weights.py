"""Perplexity of quantized language models on text that no calibration has seen: what real weights say about a method.

    python -m bench.real_weights CHECKPOINT --text FILE [FILE ...] --cases CASE [CASE ...] [--tokens N] [--json FILE]

CHECKPOINT is an image-text-to-text checkpoint with a trained language model; nothing is downloaded. A case is written
as for `lmms-plugin inspect`, without `pretrained` (`method=gptq,bits=3,group_size=64,calibration=noise`), and is
quantized as for an evaluation. `ratio` is the perplexity of the unquantized model over that of the case: below 1 where
quantization costs something. `divergence` is the mean Kullback-Leibler divergence, in nats, of the predicted next
tokens from those of the unquantized model. `processor_seconds` are those of loading, calibration and quantization, and
`anonymous_mb` the most memory that they took, as in `bench.quantize`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.quantize import MB, MemoryWatch
from bench.reporting import Row, machine, write
from lmms_plugin.quantize import Asked

LENGTH = 512
"""Tokens that are read together."""


def held_out_rows(tokenizer: Any, texts: Sequence[str], tokens: int) -> Tensor:
    """Return about `tokens` tokens of some texts in rows of `LENGTH`, evenly spread over all of them, (rows, LENGTH).

    Raises:
        ValueError: There are not as many tokens.
    """
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    wanted = max(1, tokens // LENGTH)
    if len(rows) < wanted:
        raise ValueError(f"expected {wanted * LENGTH} tokens of text, got {len(ids)}")
    return rows[torch.linspace(0, len(rows) - 1, wanted).long()]


@torch.no_grad()
def predictions(model: Any, rows: Tensor) -> list[Tensor]:
    """Return the log-probabilities of all but the first token of each row, (length - 1, vocabulary) float32."""
    found = []
    for row in rows:
        logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, :-1]
        found.append(logits.float().log_softmax(-1))
    return found


def perplexity(predicted: Sequence[Tensor], rows: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of all but the first token of each row (rows, length)."""
    nats = 0.0
    for each, row in zip(predicted, rows, strict=True):
        nats -= float(each.gather(1, row[1:, None].to(each.device)).double().sum())
    return math.exp(nats / rows[:, 1:].numel())


def divergence(exact: Sequence[Tensor], predicted: Sequence[Tensor]) -> float:
    """Return the mean Kullback-Leibler divergence of predictions from the unquantized model's, in nats."""
    each = [
        (one.exp() * (one - other)).sum(-1, dtype=torch.float64) for one, other in zip(exact, predicted, strict=True)
    ]
    return float(torch.cat(each).mean())


def run(checkpoint: str, cases: Sequence[str], texts: Sequence[str], tokens: int) -> Iterator[Row]:
    """Yield one row per case, the unquantized model first."""
    exact: list[Tensor] = []
    dense = 0.0
    for case in ("method=none", *cases):
        started = time.process_time()
        with MemoryWatch() as memory:
            vlm = Asked.parse(f"pretrained={checkpoint},{case}").load()
        seconds = time.process_time() - started
        rows = held_out_rows(vlm.chat.tokenizer, texts, tokens)
        predicted = predictions(vlm.model, rows)
        found = perplexity(predicted, rows)
        exact, dense = exact or predicted, dense or found
        report = vlm.report
        yield {
            "case": case,
            "ratio": dense / found,
            "perplexity": found,
            "divergence": divergence(exact, predicted),
            "bits_per_weight": report.bits_per_weight,
            "calibration_tokens": None if report.calibration is None else report.calibration.tokens,
            "plain_rows": sum(module.plain_rows for module in report.quantized),
            "processor_seconds": seconds,
            "anonymous_mb": (memory.peak[0] - memory.before[0]) / MB,
        }
        del vlm, predicted


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="files of plain text")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=4 * LENGTH)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in arguments.text]
    print(machine(), flush=True)
    rows = []
    for row in run(arguments.checkpoint, arguments.cases, texts, arguments.tokens):
        rows.append(row)
        shown = (f"{key} {row[key]:.4g}" for key in row if key not in ("case", "ratio") and row[key] is not None)
        print(row["case"], *shown, sep="  ", flush=True)
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
