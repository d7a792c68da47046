"""Processor time of the texts of an answer's tokens, with real tokenizers, beside decoding every beginning of it.

    python -m bench.token_texts FOLDER... [--tokens N] [--repeats N] [--json FILE]

FOLDER holds a `tokenizer.json`, or is searched for folders that do. The baseline is the definition of a token's text,
which decodes the first token, the first two, and so on, so that its time grows with the square of the answer's length;
both must give the same texts, of this answer and of random ids. The time at half the length shows how ours grows.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.reporting import Row, interleaved, machine, markdown, write
from lmms_plugin.vlm.generation.token_texts import decode, token_texts

ANSWER = (
    "<think>The red chair (second from the left) stands at [12, 340, 567, 890]; 漢字 and ไทย are on its label, and a "
    '👩‍🚀 smiles 😀 - naïve, isn\'t it?\n\n    "bbox_2d": [0.25, 1.5]</think> '
)
RANDOM_ANSWERS, RANDOM_TOKENS = 20, 150


def by_beginnings(decoded: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Return the text of each token by the definition: what it adds to the part that its beginning shares with all."""
    whole, ends = decoded(ids), [0]
    for count in range(1, len(ids)):
        text = decoded(ids[:count])
        pairs = enumerate(zip(text, whole, strict=False))
        parted = next((place for place, (mine, final) in pairs if mine != final), min(len(text), len(whole)))
        shared = len(text) if whole.startswith(text) else parted
        ends.append(max(ends[-1], shared))
    return [whole[start:end] for start, end in pairwise([*ends, len(whole)])][: len(ids)]


def measure(name: str, tokenizer: Any, tokens: int, repeats: int) -> Row:
    """Time both ways on one answer.

    Raises:
        RuntimeError: Their texts differ.
    """
    ids = tokenizer.encode(ANSWER * tokens, add_special_tokens=False)[:tokens]
    draw = random.Random(0)
    answers = [[draw.randrange(len(tokenizer)) for _ in range(RANDOM_TOKENS)] for _ in range(RANDOM_ANSWERS)]
    for one in (ids, *answers):
        if token_texts(tokenizer, one) != by_beginnings(partial(decode, tokenizer), one):
            raise RuntimeError(f"{name}: the texts of {one} differ from those of the definition")
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: token_texts(tokenizer, ids),
        "half": lambda: token_texts(tokenizer, ids[: tokens // 2]),
        "by_beginnings": lambda: by_beginnings(partial(decode, tokenizer), ids),
    }
    seconds = interleaved(calls, repeats, time.process_time)
    return {
        "case": name,
        "tokens": len(ids),
        "ms": 1e3 * seconds["ours"],
        "ms_at_half_the_length": 1e3 * seconds["half"],
        "ms_by_beginnings": 1e3 * seconds["by_beginnings"],
        "ratio": seconds["by_beginnings"] / seconds["ours"],
    }


def main() -> None:
    """Print a row for each tokenizer, and optionally write them as JSON."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = sorted({file.parent for folder in arguments.folders for file in folder.rglob("tokenizer.json")})
    if not found:
        parser.error(f"expected folders with a tokenizer.json, got none in {', '.join(map(str, arguments.folders))}")
    rows = []
    for folder in found:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows.append(measure(str(folder), tokenizer, arguments.tokens, arguments.repeats))
    print(machine())
    cells = ([f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows)
    for line in markdown(list(rows[0]), cells):
        print(line)
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
