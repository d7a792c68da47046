"""Checkpoints of compressed-tensors whose config groups store layers in different schemes, read layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex
from torch import nn

from lmms_plugin.quant_backends.checkpoints.compressors import StoredFormat, packs_weights_alone, stored_integers
from lmms_plugin.quant_backends.checkpoints.scaled_layouts import GroupScheme, group_scheme, stored_scheme
from lmms_plugin.quant_backends.formats.compressed import default_layout

PACKED_INTEGERS, MIXED = "pack-quantized", "mixed-precision"
MOST_SECONDS = 2.0
"""Of the search of a target's regular expression in one name."""


@dataclass(frozen=True)
class SchemeGroup:
    """Config group: which layers it is of, and how they are stored.

    Attributes:
        name: Name in the config.
        targets: Module names, regular expressions after ``re:``, and names of classes.
        stored: Storage; None where it is not reproduced here.
        words: Scheme in a few words, for messages.
    """

    name: str
    targets: tuple[str, ...]
    stored: StoredFormat | None
    words: str


@dataclass(frozen=True)
class SeveralSchemes:
    """Config groups with different schemes.

    Which layers are quantized is told by their tensors, as everywhere, and which scheme by the targets: a name goes
    before a regular expression, and that before a class, as in compressed-tensors. Names are those of the checkpoint
    and those of the model.

    Attributes:
        label: Name in reports.
        groups: Groups, in the config's order.
    """

    label: str
    groups: tuple[SchemeGroup, ...]

    @property
    def tensors(self) -> frozenset[str]:
        """Return all tensors that a layer of any group may have."""
        return frozenset[str]().union(*(group.stored.tensors for group in self.groups if group.stored is not None))

    @property
    def markers(self) -> frozenset[str]:
        """Return the tensors of which a layer of any group has at least one."""
        # Layers of a group that is not reproduced must be found, too, so that they can be told.
        known = (group.stored.markers for group in self.groups if group.stored is not None)
        return frozenset({"weight_scale", "weight_packed"}).union(*known)

    def of_layer(self, names: Sequence[str], dense: nn.Module) -> StoredFormat:
        """Return the storage of one layer.

        Raises:
            ValueError: No group targets it, or its scheme is not reproduced.
        """
        group = next(self._matching(names, dense), None)
        if group is None:
            listed = ", ".join(target for one in self.groups for target in one.targets)
            raise ValueError(f"{names[-1]} is stored quantized, but no config group targets it (targets are {listed})")
        if group.stored is None:
            raise ValueError(
                f"{names[-1]} is stored as {group.words} ({group.name}), a scheme that is not reproduced here"
            )
        return group.stored

    def _matching(self, names: Sequence[str], dense: nn.Module) -> Iterator[SchemeGroup]:
        classes = {kind.__name__ for kind in type(dense).__mro__}
        # A target that several groups have is the last one's, and of several expressions the first in alphabetical
        # order counts, both as in compressed-tensors.
        owner = {target: group for group in self.groups for target in group.targets}
        yield from (owner[name] for name in names if name in owner)
        expressions = sorted(target for target in owner if target.startswith("re:"))
        yield from (owner[target] for target in expressions if any(_found(target, name) for name in names))
        yield from (owner[target] for target in sorted(classes & owner.keys()))


def several_schemes(config: Mapping[str, Any]) -> SeveralSchemes | None:
    """Return the storage of a checkpoint of compressed-tensors with different schemes; None for any other.

    Raises:
        ValueError: A group quantizes something other than weights and inputs of layers, or none of them is reproduced.
    """
    groups = config.get("config_groups") or {}
    if config.get("quant_method") != "compressed-tensors" or len(groups) < 2:
        return None
    laid_out = {name: _layout(config, group) for name, group in groups.items()}
    schemes = {name: (laid_out[name], group_scheme(group)) for name, group in groups.items()}
    if all(scheme == next(iter(schemes.values())) for scheme in schemes.values()) or _integers_alone(groups, laid_out):
        return None
    read = tuple(_read(name, laid_out[name], group) for name, group in groups.items())
    return SeveralSchemes(f"compressed-tensors, {len(read)} schemes", read)


def _integers_alone(groups: Mapping[str, Any], laid_out: Mapping[str, str]) -> bool:
    """Return whether all are packed integers, whose tensors tell bits and groups."""
    return all(laid_out[name] == PACKED_INTEGERS and packs_weights_alone(group) for name, group in groups.items())


def _layout(config: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    named = group.get("format") or config.get("format")
    if named not in (None, MIXED):
        return str(named)
    weights, inputs, _ = group_scheme(group)
    return default_layout(weights or {}, inputs)


def _read(name: str, layout: str, group: Mapping[str, Any]) -> SchemeGroup:
    targets = tuple(str(target) for target in group.get("targets") or ())
    scheme = group_scheme(group)
    if not scheme.weights:
        raise ValueError(
            f"its {name} (targets {', '.join(targets)}) has no weights: values between layers are not quantized here"
        )
    try:
        stored = stored_integers(group) if layout == PACKED_INTEGERS else stored_scheme(layout, scheme)
    except ValueError as error:
        raise ValueError(f"its {name}: {error}") from error
    return SchemeGroup(name, targets, stored, f"{layout} {_words(scheme)}")


def _words(scheme: GroupScheme) -> str:
    def told(arguments: Mapping[str, Any]) -> str:
        symmetry = "" if arguments.get("symmetric", True) else "asymmetric "
        dynamic = "dynamic " if arguments.get("dynamic") else ""
        kind = f"{symmetry}{dynamic}{arguments.get('type', 'int')}{arguments.get('num_bits')}"
        return f"{kind} per {arguments.get('strategy')}"

    parts = zip(("weights", "inputs", "outputs"), scheme, strict=True)
    return ", ".join(f"{part} {told(arguments)}" for part, arguments in parts if arguments)


def _found(target: str, name: str) -> bool:
    pattern = target.removeprefix("re:")
    try:
        return regex.match(pattern, name, timeout=MOST_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        raise ValueError(f"its config targets {target!r}, which is no usable regular expression: {error}") from error
