"""What flows into linear layers: second moments of their inputs, with bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lmms_plugin.quant_backends.components import dense_linear
from lmms_plugin.quant_backends.memory import statistics_budget

ROLES = ("image", "text", "answer")
"""What a position of a calibration sample can hold, in the order of the numbers that stand for them: an image feature,
the rest of the prompt, the answer to it."""

WEIGHED = ("image", "answer")
"""The roles whose rows are summed apart."""

TOKEN_ROLES = "token_roles"
"""Key under which a calibration sample says the role of each of its positions, beside the model's own inputs."""

SAMPLE_ROWS = 512
"""Rows kept of each role, as many as AWQ's authors look at."""


class Sensitivity(NamedTuple):
    """How strongly the loss of the answers reacts to what a block puts out.

    Attributes:
        image: Mean |gradient| over the elements at image positions, 0 or above.
        answer: The same at answer positions.
    """

    image: float
    answer: float


@dataclass
class RowSample:
    """Rows drawn with equal chances from a stream of unknown length, the same ones each time.

    Attributes:
        rows: (up to `limit`, columns), in the order in which they came and in their own dtype.
        limit: How many to keep.
    """

    rows: Tensor
    limit: int = SAMPLE_ROWS
    _lots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), repr=False)
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    def add(self, x: Tensor) -> None:
        """Let the rows of x (rows, columns) take part: those that draw the lowest lots stay."""
        lots = torch.cat([self._lots, torch.rand(len(x), dtype=torch.float64, generator=self._generator)])
        kept = lots.argsort()[: self.limit].sort().values
        self.rows = torch.cat([self.rows.to(x.dtype), x])[kept.to(x.device)]
        self._lots = lots[kept]


@dataclass
class InputStatistics:
    """Sums over every input row x that a group of layers was given.

    Attributes:
        names: The layers, all fed the very same tensors.
        gram: (columns, columns) float32, Σ x xᵀ.
        magnitude: (columns,) float64, Σ |x|.
        rows: How many rows were summed.
        sample: Some of the rows, for errors that no sum can tell; None unless roles are told apart.
        roles: The same over the rows of each role of `WEIGHED` alone; empty unless roles are told apart. They hold no
            rows where a layer is not fed the positions of the sequence, as in the vision tower.
        sensitivity: Of the loss to the block that the layers belong to; None where it is not known.
    """

    names: tuple[str, ...]
    gram: Tensor
    magnitude: Tensor
    rows: int = 0
    sample: RowSample | None = None
    roles: Mapping[str, InputStatistics] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    @classmethod
    def empty(
        cls, names: tuple[str, ...], columns: int, device: torch.device, *, by_role: bool = False
    ) -> InputStatistics:
        """Return statistics of nothing.

        Args:
            names: The layers.
            columns: Width of their input.
            device: Where the sums are kept.
            by_role: Also keep rows, and sum those of each role apart.
        """
        gram = torch.zeros(columns, columns, device=device)
        statistics = cls(names, gram, torch.zeros(columns, dtype=torch.float64, device=device))
        if by_role:
            statistics.sample = RowSample(torch.empty(0, columns, device=device))
            statistics.roles = {role: cls.empty(names, columns, device) for role in WEIGHED}
            for role in statistics.roles.values():
                role.sample = RowSample(torch.empty(0, columns, device=device))
        return statistics

    @staticmethod
    def memory(columns: int, *, by_role: bool = False) -> int:
        """Return the bytes that `empty` takes, sampled rows aside."""
        return 4 * columns**2 * (1 + len(WEIGHED) * by_role)

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean |x| of each column, float32."""
        return (self.magnitude / self.rows).float()

    def add(self, x: Tensor, roles: Tensor | None = None) -> None:
        """Add the rows of an input (..., columns).

        Args:
            x: What the layers are fed.
            roles: (rows,), the place in `ROLES` of each row's role; None where rows are no positions of the sequence.

        Raises:
            ValueError: Not as many roles as rows.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if roles is not None:
            if len(roles) != len(x):
                raise ValueError(f"{self.names[0]} was fed {len(x)} rows, but the roles of {len(roles)} are given")
            for name, part in self.roles.items():
                part.add(x[(roles == ROLES.index(name)).to(x.device)])
        if self.sample is not None:
            self.sample.add(x)
        x = x.float()
        self.gram.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0, dtype=torch.float64)
        self.rows += x.shape[0]


class _Finished(Exception):
    """Every layer of interest has run: the rest of the forward pass is not needed."""


def shared_inputs(model: nn.Module, names: Sequence[str], batch: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Find which layers are fed the very same tensor (query, key and value; gate and up).

    Args:
        model: In evaluation mode.
        names: Linear layers of interest.
        batch: Keyword arguments of one forward pass.

    Returns:
        Groups of names in the order in which they ran; layers that never ran are in none.
    """
    calls: dict[str, list[int]] = {}
    last: list[tuple[int, Tensor]] = []

    def note(name: str, x: Tensor) -> None:
        if not last or last[0][1] is not x:
            last[:] = [(last[0][0] + 1 if last else 0, x)]
        calls.setdefault(name, []).append(last[0][0])

    _forward(model, names, batch, note)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in calls.items():
        groups.setdefault(tuple(inputs), []).append(name)
    return [tuple(group) for group in groups.values()]


def capture(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    budget: int | None = None,
) -> Iterator[list[InputStatistics]]:
    """Gather input statistics of linear layers over calibration samples.

    Layers are taken in the order in which they run, as many at a time as fit the budget; each such chunk
    is one pass over all samples that ends where its last layer has run. The samples go through the model
    one by one and every sum runs in the same order, so that the numbers depend neither on the budget nor
    on any batch size.

    Args:
        model: The unquantized model, in evaluation mode.
        names: Linear layers of interest.
        batches: Keyword arguments of one forward pass each.
        budget: Bytes for the statistics of one chunk; a single layer may exceed it. None for what is free.

    Yields:
        The statistics of one chunk.
    """
    groups = shared_inputs(model, names, batches[0])
    expected: list[Counter[str]] | None = None
    if budget is None:
        budget = statistics_budget(dense_linear(model, names[0]).weight.device)
    for chunk in _chunks(model, groups, budget):
        statistics = []
        for group in chunk:
            weight = dense_linear(model, group[0]).weight
            statistics.append(InputStatistics.empty(group, weight.shape[1], weight.device))
        # The first pass runs every forward to its end and counts the calls, by which the later ones stop.
        counts = _gather(model, names, statistics, batches, expected)
        expected = expected or counts
        yield statistics


def _gather(
    model: nn.Module,
    names: Sequence[str],
    statistics: Sequence[InputStatistics],
    batches: Sequence[Mapping[str, Any]],
    expected: Sequence[Counter[str]] | None,
) -> list[Counter[str]]:
    followers = {name: entry.names[0] for entry in statistics for name in entry.names}
    leaders = {entry.names[0]: entry for entry in statistics}
    watched = list(names) if expected is None else list(followers)
    counts = []
    for index, batch in enumerate(tqdm(batches, desc="Calibrating", leave=False, disable=None)):
        seen: Counter[str] = Counter()
        remaining = None if expected is None else sum(expected[index][name] for name in followers)
        fed: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> None:
            seen[name] += 1  # noqa: B023
            leader = followers.get(name)
            if leader == name:
                leaders[name].add(x)
                fed[name] = x  # noqa: B023
            elif leader is not None and fed.get(leader) is not x:  # noqa: B023
                raise RuntimeError(f"{name} shared its input with {leader} in the first sample, but not in this one")
            if remaining is not None and seen.total() == remaining:  # noqa: B023
                raise _Finished

        _forward(model, watched, batch, note)
        counts.append(seen)
    return counts


@torch.no_grad()
def _forward(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, Any], note: Callable[[str, Tensor], None]
) -> None:
    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(_Hook(model.get_submodule(name), name, note))
        try:
            model(**batch)
        except _Finished:
            return


class _Hook:
    """A forward pre-hook for the time of a ``with`` block."""

    def __init__(self, module: nn.Module, name: str, note: Callable[[str, Tensor], None]) -> None:
        self.handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: note(name, args[0] if args else kwargs["input"]), with_kwargs=True
        )

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _chunks(model: nn.Module, groups: Sequence[tuple[str, ...]], budget: int) -> Iterator[list[tuple[str, ...]]]:
    chunk: list[tuple[str, ...]] = []
    used = 0
    for group in groups:
        size = InputStatistics.memory(dense_linear(model, group[0]).in_features)
        if chunk and used + size > budget:
            yield chunk
            chunk, used = [], 0
        chunk.append(group)
        used += size
    if chunk:
        yield chunk
