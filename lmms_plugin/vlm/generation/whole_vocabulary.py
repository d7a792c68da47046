"""Distributions over the whole vocabulary, step by step: kept of one model, and compared with those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class StepWatcher(Protocol):
    """Watcher of the logits of each step of a generation, before anything changes them."""

    def note(self, logits: Tensor, total: Tensor, chosen: Tensor) -> None:
        """Take one step.

        Args:
            logits: (rows, vocabulary).
            total: (rows,) their logsumexp.
            chosen: (rows,) ids of the chosen tokens.
        """


@dataclass
class DistributionKeeper:
    """Keeper of every step's log-probabilities, on the host in float32."""

    _steps: list[Tensor] = field(default_factory=list)

    def note(self, logits: Tensor, total: Tensor, chosen: Tensor) -> None:
        """Take one step; see `StepWatcher`."""
        self._steps.append((logits.float() - total.float().unsqueeze(1)).cpu())

    def row(self, index: int, length: int) -> Tensor:
        """Return the log-probabilities of one row's first steps, shape (length, vocabulary)."""
        return torch.stack([step[index] for step in self._steps[:length]])


class DivergenceRecorder:
    """Recorder of the KL divergence from kept distributions, and of whether the likeliest tokens are the same.

    Args:
        kept: Log-probabilities of each row, (steps, vocabulary); rows may have different numbers of steps.
    """

    def __init__(self, kept: Sequence[Tensor]) -> None:
        self._kept = kept
        self._divergences: list[list[float]] = [[] for _ in kept]
        self._agreed: list[list[bool]] = [[] for _ in kept]
        self._step = 0

    def note(self, logits: Tensor, total: Tensor, chosen: Tensor) -> None:
        """Take one step; see `StepWatcher`.

        Raises:
            ValueError: The vocabularies differ in size.
        """
        rows = [row for row, kept in enumerate(self._kept) if self._step < len(kept)]
        if not rows:
            return
        first = torch.stack([self._kept[row][self._step] for row in rows]).to(logits.device)
        second = logits[rows].float() - total[rows].float().unsqueeze(1)
        if first.shape != second.shape:
            raise ValueError(
                f"reference: expected a model with the same vocabulary, got {first.shape[1]} tokens and "
                f"{second.shape[1]}: name the checkpoint that this one was quantized from"
            )
        # A token of probability 0 adds nothing, whatever the other model gives it.
        terms = torch.where(first > -torch.inf, first.exp() * (first - second), 0.0)
        divergences = terms.sum(1).clamp(min=0.0).tolist()
        agreed = (first.argmax(1) == second.argmax(1)).tolist()
        for row, divergence, same in zip(rows, divergences, agreed, strict=True):
            self._divergences[row].append(divergence)
            self._agreed[row].append(same)
        self._step += 1

    def of(self, row: int) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """Return a row's divergences in nats and whether the likeliest tokens agree, one of each per kept step."""
        return tuple(self._divergences[row]), tuple(self._agreed[row])
