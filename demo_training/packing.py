"""Scenes as training batches: several questions about one picture packed in one sequence, and labels for its cells."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo_training.architecture import CELLS, DIALECT, END, PATCH, SHUFFLE, prompt_ids
from lmms_plugin.demo.scenes import MAX_OBJECTS, SIDE, Scene, SceneObject
from lmms_plugin.demo.wording import COLOURS, FILLS, SHAPES, SIZES
from lmms_plugin.protocol.boxes import Box

QUESTIONS = 6
_CELL = PATCH * SHUFFLE
_ATTRIBUTES = (SHAPES, COLOURS, SIZES, FILLS)
# How many classes each part of the probe tells apart: four attributes (of colours, 0 is the background), eight digits.
PROBE = [len(SHAPES), len(COLOURS) + 1, len(SIZES), len(FILLS)] + [10] * 8
# What cross_entropy skips.
IGNORED = -100


class Questions(NamedTuple):
    """Packed questions about a batch of scenes; B scenes, L tokens."""

    ids: Tensor  # (B, L)
    positions: Tensor  # (B, L)
    segments: Tensor  # (B, L): 0 the image prefix, k the k-th question, -1 padding
    labels: Tensor  # (B, L): the next token where it belongs to an answer, else IGNORED
    meant: Tensor  # (B, L): index of the object that the answer is about, -1 outside answers
    shares: Tensor  # (B, MAX_OBJECTS, C): which part of each object's silhouette lies in which cell


def answer(item: SceneObject) -> str:
    """The text that says where an object is."""
    return DIALECT.write(Box.from_xywh(item.box, (SIDE, SIDE)))


def _covered(drawn: Scene) -> NDArray[np.int64]:
    """How many pixels of each object's silhouette lie in each cell: (CELLS², objects)."""
    blocks = drawn.owner.reshape(CELLS, _CELL, CELLS, _CELL).transpose(0, 2, 1, 3).reshape(CELLS**2, -1)
    return np.stack([(blocks == i).sum(1) for i in range(len(drawn.objects))], axis=1)


def _shares(drawn: Scene) -> NDArray[np.float32]:
    covered = _covered(drawn).T
    shares = np.zeros((MAX_OBJECTS, CELLS**2), np.float32)
    shares[: len(covered)] = covered / covered.sum(1, keepdims=True)
    return shares


def cell_labels(drawn: Scene) -> NDArray[np.int64]:
    """What each image token shows: (CELLS², len(PROBE)) classes, IGNORED where background has none.

    A cell belongs to the object that covers most of it, and to the background when none covers a sixth.
    """
    covered = _covered(drawn)
    table = np.full((len(drawn.objects) + 1, len(PROBE)), IGNORED)
    table[-1, 1] = 0
    for row, item in zip(table, drawn.objects, strict=False):
        row[:4] = [values.index(a) for values, a in zip(_ATTRIBUTES, item.attributes, strict=True)]
        row[1] += 1
        row[4:] = [int(c) for c in answer(item) if c.isdigit()]
    owner = np.where(covered.max(1) * 6 >= _CELL**2, covered.argmax(1), -1)
    return table[owner]


def look(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Pictures of scenes (B, 3, SIDE, SIDE) in [-1, 1] and the labels of their cells (B, C, len(PROBE))."""
    pixels = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(), torch.from_numpy(np.stack([cell_labels(s) for s in scenes]))


def pack(scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> Questions:
    """Turn the expressions of scenes into one batch of packed questions."""
    rows = [_pack_one(drawn, tokenizer) for drawn in scenes]
    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_token_id, 0, -1, IGNORED, -1)
    columns = [torch.tensor([r[k] + [f] * (length - len(r[k])) for r in rows]) for k, f in enumerate(fills)]
    columns.append(torch.from_numpy(np.stack([_shares(s) for s in scenes])))
    return Questions(*columns)


def _pack_one(drawn: Scene, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], ...]:
    items = list(enumerate(drawn.objects))
    pairs = [(i, e, answer(item)) for k in range(3) for i, item in items for e in item.expressions[k : k + 1]]
    # Every object is asked for once before any is asked for again; the rest would be padding for most scenes.
    pairs = pairs[:QUESTIONS]
    prefix, questions = prompt_ids(tokenizer, [expression for _, expression, _ in pairs])
    answers = tokenizer([text + END for _, _, text in pairs], add_special_tokens=False)["input_ids"]
    ids, positions = list(prefix), list(range(len(prefix)))
    segments, labels, meant = [0] * len(prefix), [IGNORED] * len(prefix), [-1] * len(prefix)
    for k, (question, reply) in enumerate(zip(questions, answers, strict=True), start=1):
        # The last token of the reply is the end mark: predicted, never read.
        tokens = question + reply[:-1]
        ids += tokens
        positions += range(len(prefix), len(prefix) + len(tokens))
        segments += [k] * len(tokens)
        labels += [IGNORED] * (len(question) - 1) + reply
        meant += [-1] * (len(question) - 1) + [pairs[k - 1][0]] * len(reply)
    return ids, positions, segments, labels, meant


def visible(segments: Tensor) -> Tensor:
    """Attention mask (B, 1, L, L), true where a token may look: back, at the image or its own question."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    of, at = segments[:, :, None], segments[:, None, :]
    return (causal & ((at == 0) | (at == of)))[:, None]
