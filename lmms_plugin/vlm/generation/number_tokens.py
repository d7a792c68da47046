"""Tokens with which a model writes numbers, and their probabilities where one of them was chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from lmms_plugin.protocol.response import Alternatives
from lmms_plugin.vlm.generation.token_texts import decode

LISTED = 32
"""How many alternatives of a token are told apart: all ten where tokens are digits, the likeliest of locations."""
LEAST = 5e-5
"""Probability below which an alternative goes unlisted."""

_ONE_RUN = re.compile(r"([^0-9]*)([0-9]+)([^0-9]*)")


class NumberTokens:
    """Tokens of a vocabulary that write one run of digits, grouped by the text around it.

    Tokens with the same text around their digits can replace one another: "7" and "12", "<loc0007>" and "<loc0012>".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Byte-level vocabularies write ASCII digits as they are, so only tokens with one in them need decoding.
        with_digits = sorted(index for text, index in tokenizer.get_vocab().items() if re.search("[0-9]", text))
        found = [(index, _ONE_RUN.fullmatch(decode(tokenizer, [index]))) for index in with_digits]
        matches = [(index, match) for index, match in found if match is not None]
        around = {match.group(1, 3): k for k, (_, match) in enumerate(matches)}
        self.ids = [index for index, _ in matches]
        self.digits = [match[2] for _, match in matches]
        self.around = [around[match.group(1, 3)] for _, match in matches]


@dataclass
class DigitRecorder:
    """Recorder of the probabilities, step by step, of all tokens that could replace a chosen one with digits.

    Attributes:
        tokens: Tokens of the vocabulary.
    """

    tokens: NumberTokens
    _steps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def note(self, logits: Tensor, total: Tensor, chosen: Tensor) -> None:
        """Record one step.

        Args:
            logits: (rows, vocabulary).
            total: (rows,) their logsumexp.
            chosen: (rows,) ids of the chosen tokens.
        """
        if not self.tokens.ids:
            return
        if not self._steps:
            self._ids = torch.tensor(self.tokens.ids, device=logits.device)
            self._around = torch.tensor(self.tokens.around, device=logits.device)
            self._around_of = torch.full((logits.shape[1],), -1, device=logits.device)
            self._around_of[self._ids] = self._around
        like = self._around == self._around_of[chosen].unsqueeze(1)
        logprobs = logits.index_select(1, self._ids).float() - total.unsqueeze(1).float()
        probabilities = torch.where(like, logprobs.exp(), 0.0)
        top = probabilities.topk(min(LISTED, len(self.tokens.ids)), dim=1)
        self._steps.append((top.values, top.indices, probabilities.sum(1)))

    def alternatives(self) -> list[list[Alternatives | None]] | None:
        """Return the record, a list of one entry per step for each row; None where the vocabulary has no digits.

        An entry is None where the chosen token writes no digits.
        """
        if not self._steps:
            return None
        columns = (torch.stack(column, dim=1).tolist() for column in zip(*self._steps, strict=True))
        return [[self._read(*step) for step in zip(*row, strict=True)] for row in zip(*columns, strict=True)]

    def _read(self, probabilities: list[float], indices: list[int], total: float) -> Alternatives | None:
        if total <= 0.0:
            return None
        listed: dict[str, float] = {}
        for probability, index in zip(probabilities, indices, strict=True):
            if probability >= LEAST:
                digits = self.tokens.digits[index]
                # Some vocabularies hold a digit twice, as a character and as a byte.
                listed[digits] = min(1.0, listed.get(digits, 0.0) + probability)
        return Alternatives(listed, min(1.0, max(0.0, total - sum(listed.values()))))
