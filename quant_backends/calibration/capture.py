"""What the layers of one block are fed: which of them share a tensor, and the statistics of it."""

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
    """Tell `note` the name and the input of each of the named layers whenever one of them is called."""

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
    """Run a block on what one sample brings to it, and tell `note` what the named layers within are fed.

    Args:
        model: The whole model.
        names: Layers within the block; the block itself may be the only one.
        forward: Of the block, without its hooks.
        call: Of the block.
        note: Takes name and input of a layer.

    Returns:
        The block's output.
    """
    if call.name in names:
        note(call.name, _first(call.args, call.kwargs))
    with WideProducts(), watching(model, (name for name in names if name != call.name), note):
        return forward(*call.args, **call.kwargs)


class Sharing:
    """Finds out which layers are fed one tensor (query, key and value; gate and up), from one sample."""

    def __init__(self) -> None:
        self._calls: dict[str, list[int]] = {}
        self._latest: tuple[int, Tensor] | None = None

    def note(self, name: str, x: Tensor) -> None:
        """Take note of an input; layers that share it are expected one after another."""
        if self._latest is None or self._latest[1] is not x:
            self._latest = (0 if self._latest is None else self._latest[0] + 1, x)
        self._calls.setdefault(name, []).append(self._latest[0])

    @property
    def groups(self) -> Groups:
        """The groups; layers that never ran are in none."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, inputs in self._calls.items():
            groups.setdefault(tuple(inputs), []).append(name)
        return [tuple(group) for group in groups.values()]


class Gathering:
    """Statistics of some groups of layers, one sample after another.

    Every sum runs over the samples in their order and over each sample's rows at once, so that the numbers do not
    depend on how many groups are gathered together.

    Args:
        model: The whole model.
        groups: What to gather.
        by_role: Whether image, prompt and answer tokens are told apart.
        holds_back: Whether some rows are held back.
    """

    def __init__(self, model: nn.Module, groups: Groups, *, by_role: bool = False, holds_back: bool = False) -> None:
        self.statistics: list[InputStatistics] = []
        for group in groups:
            weight = dense_linear(model, group[0]).weight
            entry = InputStatistics.empty(group, weight.shape[1], weight.device, by_role=by_role, holds_back=holds_back)
            self.statistics.append(entry)
        self._leader_of = {name: entry.names[0] for entry in self.statistics for name in entry.names}
        self._experts = {name: expert_of(model, name) for name in self._leader_of}
        self._entries = {entry.names[0]: entry for entry in self.statistics}

    @property
    def names(self) -> tuple[str, ...]:
        """All layers of all groups."""
        return tuple(self._leader_of)

    def noting(self, roles: Mapping[str, Tensor], held_back: slice = slice(0)) -> Note:
        """Return what takes note of one sample's inputs.

        Args:
            roles: Layer -> role of each position of the sample, for layers fed the positions of the sequence.
            held_back: Which rows of each input are held back.
        """
        fed: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> None:
            leader = self._leader_of[name]
            if leader == name:
                rows = x.numel() // x.shape[-1]
                role = self._role_of_rows(name, roles.get(name))
                # Layers that look at image features past the sequence (cross attention) have rows of their own.
                self._entries[name].add(x, role if role is not None and len(role) == rows else None, held_back)
                fed[name] = x
            elif fed.get(leader) is not x:
                raise RuntimeError(f"{name} shared its input with {leader} in the first sample, but not in this one")

        return note

    def _role_of_rows(self, name: str, roles: Tensor | None) -> Tensor | None:
        """Return the roles of those positions that are sent to the layer's expert, if it belongs to one."""
        expert = self._experts[name]
        if roles is None or expert is None or expert.fed is None:
            return roles
        return roles.reshape(-1)[expert.fed.rows.cpu()] if expert.fed.total == roles.numel() else None

    def expect_finite(self, sample: int) -> None:
        """Refuse inputs that are NaN or infinite, as soon as one sample brings them.

        Raises:
            ValueError: Naming layer and sample.
        """
        sums = torch.stack([entry.magnitude.sum() for entry in self.statistics])
        for entry, finite in zip(self.statistics, torch.isfinite(sums).tolist(), strict=True):
            if not finite:
                raise ValueError(
                    f"{entry.names[0]}: its inputs hold NaN or infinite values in calibration sample {sample}; "
                    "the unquantized model overflows on it (dtype=bfloat16 or float32 reaches further than float16)"
                )


def chunks(
    model: nn.Module, groups: Sequence[tuple[str, ...]], budget: int, *, by_role: bool, holds_back: bool
) -> Iterator[Groups]:
    """Deal groups out so that the statistics of each lot fit the budget, or are those of a single group."""
    chunk: Groups = []
    used = 0
    for group in groups:
        columns = dense_linear(model, group[0]).in_features
        size = InputStatistics.memory(columns, by_role=by_role, holds_back=holds_back)
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
