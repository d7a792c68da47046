"""Which requests are answered together: questions about one image first, then images of like length."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Rows that a batch of several images may be padded by; beyond it a batch of its own is cheaper.
MOST_PADDING = 0.2
CPU_CACHE_BYTES = 2**30
# Below it, room for keys and values is not what was short.
LEAST_CACHE_BYTES = 2**26
MOST_GROUPS = 256


class RequestGroup(NamedTuple):
    """Requests that share their images.

    Attributes:
        members: indices of the requests.
        lengths: tokens of each request's prompt, images included.
        kind: what requests of one batch must have in common.
    """

    members: tuple[int, ...]
    lengths: tuple[int, ...]
    kind: object = None

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)


class Limits(NamedTuple):
    """How large a batch may be.

    Attributes:
        groups: images, or requests without siblings.
        tokens: groups times the padded length of a prompt.
    """

    groups: int
    tokens: int


FIRST_LIMITS = Limits(8, 8192)


def pack(groups: Sequence[RequestGroup], limits: Limits) -> list[list[RequestGroup]]:
    """Put groups of one kind into batches, the long ones together and the short ones together.

    Returns:
        Batches ordered by their first request. A batch of several groups keeps the limits and is padded by at most
        `MOST_PADDING`; a group alone may be larger.
    """
    order = sorted(groups, key=lambda group: (repr(group.kind), -group.longest, group.members))
    batches: list[list[RequestGroup]] = []
    for group in order:
        if batches and _fits([*batches[-1], group], limits):
            batches[-1].append(group)
        else:
            batches.append([group])
    return sorted(batches, key=lambda batch: min(group.members for group in batch))


def in_order(lengths: Sequence[int], limits: Limits) -> list[range]:
    """Part requests of one kind, each to go alone, into batches that keep the limits; all stay in their order.

    Args:
        lengths: tokens of each request's prompt.
        limits: of a batch; one of a single request may be larger.
    """
    parts = [range(0)]
    for i, _ in enumerate(lengths):
        longer = range(parts[-1].start, i + 1)
        if len(longer) > limits.groups or max(lengths[j] for j in longer) * len(longer) > limits.tokens:
            longer = range(i, i + 1)
            parts.append(longer)
        parts[-1] = longer
    return [part for part in parts if part]


def _fits(batch: Sequence[RequestGroup], limits: Limits) -> bool:
    if len(batch) > limits.groups or any(group.kind != batch[0].kind for group in batch):
        return False
    # A group's images and what is shared go through the model once; its further questions are short.
    padded = max(group.longest for group in batch) * len(batch)
    return padded <= limits.tokens and waste(batch) <= MOST_PADDING


def waste(batch: Sequence[RequestGroup]) -> float:
    """Share of padding in a batch whose rows are as long as its longest prompt."""
    lengths = [length for group in batch for length in group.lengths]
    return 1 - sum(lengths) / (max(lengths) * len(lengths))


@dataclass
class Budget:
    """How much is answered at once, which automatic batches learn as they go.

    Attributes:
        limits: of a batch.
        cache_bytes: how large the keys and values of a batch of questions about shared images may be.
        automatic: whether `limits` were left to us.
        growing: whether larger batches are still to be tried.
    """

    limits: Limits
    cache_bytes: int
    automatic: bool
    growing: bool

    @classmethod
    def of(cls, batch_size: int | None, free_bytes: int | None) -> Budget:
        """Begin with what the user asked for, or for None with little.

        Args:
            batch_size: images (or requests without one) per batch; None to find out.
            free_bytes: memory of an accelerator that is not in use; None on a CPU, where a batch that is too large ends
                the process instead of raising, and larger ones do not pay: there the budget is fixed.
        """
        cache_bytes = CPU_CACHE_BYTES if free_bytes is None else free_bytes // 4
        if batch_size is not None:
            return cls(Limits(batch_size, sys.maxsize), cache_bytes, automatic=False, growing=False)
        return cls(FIRST_LIMITS, cache_bytes, automatic=True, growing=free_bytes is not None)

    def succeeded(self, groups: int) -> None:
        """Note that a batch of so many groups fitted."""
        if self.growing and 2 * groups > self.limits.groups and self.limits.groups < MOST_GROUPS:
            self.limits = Limits(2 * self.limits.groups, 2 * self.limits.tokens)

    def failed(self, groups: int, *, shared: bool) -> None:
        """Note that a batch of so many groups did not fit; `shared` means that it was one over shared prefixes."""
        self.growing = False
        if shared and self.cache_bytes > LEAST_CACHE_BYTES:
            self.cache_bytes = max(LEAST_CACHE_BYTES, self.cache_bytes // 2)
        if self.automatic:
            limits = self.limits
            self.limits = Limits(max(1, min(limits.groups, groups) // 2), max(1, limits.tokens // 2))
