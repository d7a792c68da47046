"""Self-consistency: agreement of sampled answers with the answer given, and among themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

from lmms_plugin.protocol.boxes import Box, iou

Answer = TypeVar("Answer")


class Agreement(NamedTuple):
    """Agreement of k sampled answers.

    Attributes:
        with_answer: Agreement of each with the answer given, k values in [0, 1]; () where that cannot be read.
        among_samples: Agreement of each pair, k(k−1)/2 values in [0, 1].
        usable: Number of the k samples that can be read; the others agree with nothing, and count 0 everywhere.
    """

    with_answer: tuple[float, ...]
    among_samples: tuple[float, ...]
    usable: int

    @classmethod
    def of(
        cls,
        answer: Answer | None,
        sampled: Sequence[Answer | None],
        similarity: Callable[[Answer, Answer], float],
    ) -> Agreement:
        """Compare answers.

        Args:
            answer: Answer given; None where it cannot be read.
            sampled: The k sampled answers; None where one cannot be read.
            similarity: Similarity of two answers, symmetric, in [0, 1].
        """

        def agree(a: Answer | None, b: Answer | None) -> float:
            return 0.0 if a is None or b is None else similarity(a, b)

        return cls(
            () if answer is None else tuple(agree(answer, one) for one in sampled),
            tuple(agree(a, b) for a, b in combinations(sampled, 2)),
            sum(one is not None for one in sampled),
        )

    @classmethod
    def of_boxes(cls, answer: Box | None, sampled: Sequence[Box | None]) -> Agreement:
        """Compare boxes by IoU."""
        return cls.of(answer, sampled, iou)
