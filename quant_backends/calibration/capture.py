"""Inputs of the layers of one block: which layers share an input tensor, and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.calibration.suspension import SuspendedCall
from lmms_plugin.quant_backends.layers.wide_products import WideProducts
from lmms_plugin.quant_backends.statistics import InputStatistics
from lmms_plugin.quant_backends.structure.components import dense_linear
from lmms_plugin.quant_backends.structure.experts import expert_of

Note = Callable[[str, Tensor], None]
Groups = list[tuple[str, ...]]
"""Names of layers that are fed the very same tensor, in the order in which they run."""


@contextmanager
def watching(model: nn.Module, names: Iterable[str], note: Note) -> Iterator[None]:
    """Call `note` with the name and the input of each of the named layers whenever it is called."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: note(name, _first(args, kwargs))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module, names: Collection[str], forward: Callable[..., Any], call: SuspendedCall, note: Note
) -> Any:
    """Run a block on one sample and pass the inputs of the named layers within it to `note`.

    Args:
        model: Whole model.
        names: Layers within the block; the block itself may be the only one.
        forward: Forward function of the block, without its hooks.
        call: Suspended call of the block.
        note: Callback that takes the name and the input of a layer.

    Returns:
        Output of the block.
    """
    if call.name in names:
        note(call.name, _first(call.args, call.kwargs))
    with WideProducts(), watching(model, (name for name in names if name != call.name), note):
        return forward(*call.args, **call.kwargs)


class Sharing:
    """Finder of layers that share an input tensor (query, key and value; gate and up), from one sample."""

    def __init__(self) -> None:
        self._calls: dict[str, list[int]] = {}
        self._latest: tuple[int, Tensor] | None = None

    def note(self, name: str, x: Tensor) -> None:
        """Record an input; layers that share it must come one after another."""
        if self._latest is None or self._latest[1] is not x:
            self._latest = (0 if self._latest is None else self._latest[0] + 1, x)
        self._calls.setdefault(name, []).append(self._latest[0])

    @property
    def groups(self) -> Groups:
        """Return the groups of layers that share an input; layers that never ran are in none."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in self._calls.items():
            groups.setdefault(tuple(inputs), []).append(name)
        return [tuple(group) for group in groups.values()]


class Gathering:
    """Statistics of some groups of layers, accumulated sample by sample.

    Every sum runs over the samples in order and over all rows of a sample at once, so that the numbers do not depend on
    how many groups are gathered together.

    Args:
        model: Whole model.
        groups: Groups of layers to gather statistics for.
        kept: What statistics keep besides the sums (see `InputStatistics.empty`).
    """

    def __init__(self, model: nn.Module, groups: Groups, **kept: bool) -> None:
        self.statistics: list[InputStatistics] = []
        for group in groups:
            weight = dense_linear(model, group[0]).weight
            entry = InputStatistics.empty(group, weight.shape[1], weight.device, **kept)
            self.statistics.append(entry)
        self._leader_of = {name: entry.names[0] for entry in self.statistics for name in entry.names}
        self._experts = {name: expert_of(model, name) for name in self._leader_of}
        self._entries = {entry.names[0]: entry for entry in self.statistics}

    @property
    def names(self) -> tuple[str, ...]:
        """Return all layers of all groups."""
        return tuple(self._leader_of)

    def noting(
        self,
        roles: Mapping[str, Tensor],
        held_back: slice = slice(0),
        *,
        weights: Mapping[str, Tensor] | None = None,
        dense: Mapping[str, list[Tensor]] | None = None,
    ) -> Note:
        """Return the callback that accumulates one sample's inputs.

        Args:
            roles: Layer -> role of each position of the sample, for layers whose rows are sequence positions.
            held_back: Which rows of each input are held out.
            weights: Layer -> weight of each position of the sample, as far as known.
            dense: First layer of a group -> its inputs in the unquantized model, call by call (`noting_dense`).
        """
        fed: dict[str, Tensor] = {}
        weights, earlier = weights or {}, {name: list(inputs) for name, inputs in (dense or {}).items()}

        def note(name: str, x: Tensor) -> None:
            leader = self._leader_of[name]
            if leader == name:
                rows = x.numel() // x.shape[-1]
                # Layers that see image features outside the sequence (cross attention) have rows of their own.
                role, weight = (
                    found if found is not None and len(found) == rows else None
                    for found in (self._of_rows(name, each.get(name)) for each in (roles, weights))
                )
                twin = earlier[name].pop(0) if earlier.get(name) else None
                self._entries[name].add(x, role, held_back, weights=weight, dense=twin)
                fed[name] = x
            elif fed.get(leader) is not x:
                raise RuntimeError(f"{name} shared its input with {leader} in the first sample, but not in this one")

        return note

    def noting_dense(self, inputs: dict[str, list[Tensor]]) -> Note:
        """Return the callback that keeps one sample's inputs in the unquantized model, in `inputs`.

        Experts are left out: after quantized blocks other tokens may be sent to them.
        """

        def note(name: str, x: Tensor) -> None:
            if self._leader_of[name] == name and self._experts[name] is None:
                inputs.setdefault(name, []).append(x.detach())

        return note

    def _of_rows(self, name: str, values: Tensor | None) -> Tensor | None:
        """Return the values of the positions routed to the layer's expert, if it belongs to one."""
        expert = self._experts[name]
        if values is None or expert is None or expert.fed is None:
            return values
        return values.reshape(-1)[expert.fed.rows.cpu()] if expert.fed.total == values.numel() else None

    def expect_finite(self, sample: int) -> None:
        """Refuse NaN or infinite inputs as soon as one sample brings them.

        Raises:
            ValueError: Inputs are not finite; the message names layer and sample.
        """
        sums = torch.stack([entry.magnitude.sum() for entry in self.statistics])
        for entry, finite in zip(self.statistics, torch.isfinite(sums).tolist(), strict=True):
            if not finite:
                raise ValueError(
                    f"{entry.names[0]}: its inputs hold NaN or infinite values in calibration sample {sample}; "
                    "the unquantized model overflows on it (dtype=bfloat16 or float32 reaches further than float16)"
                )


def chunks(model: nn.Module, groups: Sequence[tuple[str, ...]], budget: int, **kept: bool) -> Iterator[Groups]:
    """Split the groups into lots whose statistics fit the budget, or that hold a single group."""
    chunk: Groups = []
    used = 0
    for group in groups:
        columns = dense_linear(model, group[0]).in_features
        size = InputStatistics.memory(columns, **kept)
        if chunk and used + size > budget:
            yield chunk
            chunk, used = [], 0
        chunk.append(group)
        used += size
    if chunk:
        yield chunk


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    x = args[0] if args else kwargs["input"]
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a linear layer to be fed a tensor, got {type(x).__name__}")
    return x
