"""Bits by the role that a layer plays in the decoder (arXiv:2406.08155): frozen values, pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lmms_plugin.quant_backends.plans.specs import (
    UNTOUCHED_BITS,
    QuantSpec,
    expect_keys,
    is_int,
    read_spec,
    write_spec,
)
from lmms_plugin.quant_backends.structure.expert_use import read_use

Role = Literal["attention", "mlp", "shared_expert", "routed_experts", "router"]

ROLES: tuple[Role, ...] = ("attention", "mlp", "shared_expert", "routed_experts", "router")
"""The roles of a decoder's layers; `mlp` is the feed-forward part of blocks without experts."""

ROUTER_REASON = "a router decides which experts run and is never quantized"


class Place(NamedTuple):
    """Where in the decoder a layer lies.

    Attributes:
        role: What it does there.
        block: Number of its block, from 0.
        experts: Name of the module that holds its expert and all those beside it; None for other roles.
        expert: Number of its expert; None for other roles.
    """

    role: Role
    block: int
    experts: str | None = None
    expert: int | None = None


@dataclass(frozen=True)
class RoutedSpecs:
    """Specs of routed experts by how many tokens they are sent.

    Attributes:
        frequent: Of the most used experts of each layer; None leaves them untouched.
        rare: Of all others; None leaves them untouched.
        share: Which fraction of a layer's experts counts as frequent, in (0, 1); at least one expert does.
        counted: Module name -> tokens of each of its experts, counted before; None counts calibration tokens.
    """

    frequent: QuantSpec | None
    rare: QuantSpec | None
    share: float
    counted: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise ValueError(f"share must be a fraction between 0 and 1, got {self.share!r}")

    def of(self, expert: int, tokens: tuple[int, ...]) -> QuantSpec | None:
        """Return the spec of one expert.

        Args:
            expert: Its number.
            tokens: Tokens sent to each expert of its layer; of equally used ones the first comes first.
        """
        ranking = sorted(range(len(tokens)), key=lambda index: (-tokens[index], index))
        return self.frequent if expert in ranking[: max(1, math.ceil(self.share * len(tokens)))] else self.rare


@dataclass(frozen=True)
class FirstBlocks:
    """The bits that layers of the first blocks have at least.

    Attributes:
        count: How many blocks, 1 or more.
        spec: A layer whose other rules ask for fewer bits gets this one; None leaves such layers untouched.
    """

    count: int
    spec: QuantSpec | None

    def __post_init__(self) -> None:
        if not is_int(self.count) or self.count < 1:
            raise ValueError(f"count must be a positive integer, got {self.count!r}")


@dataclass(frozen=True)
class RolePlan:
    """Specs by role, for layers of the decoder.

    Attributes:
        specs: Role -> spec, None for untouched; roles that are not there are left to the component.
        routed: Specs of routed experts by use; None where all of them are alike.
        first_blocks: What the first blocks get at least; None treats them like all others.
    """

    specs: Mapping[Role, QuantSpec | None]
    routed: RoutedSpecs | None = None
    first_blocks: FirstBlocks | None = None

    @property
    def asked(self) -> tuple[Role, ...]:
        """The roles that the plan speaks about, routers aside."""
        by_use: tuple[Role, ...] = ("routed_experts",) if self.routed is not None else ()
        return tuple(role for role in ROLES if role != "router" and (role in self.specs or role in by_use))

    @property
    def named(self) -> tuple[QuantSpec | None, ...]:
        """Every spec that the plan names."""
        routed = () if self.routed is None else (self.routed.frequent, self.routed.rare)
        first = () if self.first_blocks is None else (self.first_blocks.spec,)
        return (*self.specs.values(), *routed, *first)

    def decide(
        self, place: Place, default: QuantSpec | None, use: Mapping[str, tuple[int, ...]] | None
    ) -> tuple[QuantSpec | None, str | None]:
        """Return the spec of a layer and which entry decided it, None for an entry if it is the default.

        Args:
            place: Of the layer.
            default: Its component's spec.
            use: Module name -> tokens of each of its experts. None where they are not counted yet: experts then get
                the finer of their two specs.
        """
        spec, entry = default, None if place.role not in self.asked else str(place.role)
        if place.role == "routed_experts" and self.routed is not None:
            spec = self._by_use(place, use)
        elif place.role in self.specs:
            spec = self.specs[place.role]
        first = self.first_blocks
        if first is not None and place.block < first.count and bits_of(spec) < bits_of(first.spec):
            return first.spec, "first_blocks"
        return spec, entry

    def _by_use(self, place: Place, use: Mapping[str, tuple[int, ...]] | None) -> QuantSpec | None:
        assert self.routed is not None
        assert place.experts is not None
        assert place.expert is not None
        use = self.routed.counted or use
        if use is None:
            return max(self.routed.frequent, self.routed.rare, key=bits_of)
        if place.experts not in use:
            raise ValueError(
                f"roles: routed_experts: tokens were counted for {len(use)} layers like {next(iter(use), 'none')}, but "
                f"not for {place.experts} of this model"
            )
        tokens = use[place.experts]
        if place.expert >= len(tokens):
            raise ValueError(f"{place.experts} has more experts than the {len(tokens)} that tokens were counted for")
        return self.routed.of(place.expert, tokens)

    def expect_roles(self, places: Mapping[str, Place]) -> None:
        """Refuse a plan for roles that a model does not have.

        Raises:
            ValueError: No layer plays a role that the plan names, or there are fewer blocks than it counts.
        """
        present = {place.role for place in places.values()}
        for role in self.asked:
            if role not in present:
                known = ", ".join(sorted(present)) or "none"
                raise ValueError(f"the plan's roles name {role}, but this model's layers are: {known}")
        blocks = 1 + max((place.block for place in places.values()), default=-1)
        if self.first_blocks is not None and self.first_blocks.count > blocks:
            raise ValueError(f"the plan's first_blocks are {self.first_blocks.count}, this decoder has {blocks} blocks")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        written: dict[str, Any] = {role: write_spec(spec) for role, spec in self.specs.items()}
        if self.routed is not None:
            written["routed_experts"] = {
                "frequent": write_spec(self.routed.frequent),
                "rare": write_spec(self.routed.rare),
                "share": self.routed.share,
                "use": self.routed.counted and {name: list(tokens) for name, tokens in self.routed.counted.items()},
            }
        if self.first_blocks is not None:
            written["first_blocks"] = {"count": self.first_blocks.count, "spec": write_spec(self.first_blocks.spec)}
        return written


def bits_of(spec: QuantSpec | None) -> int:
    """Return the bits of a spec, those of an untouched weight for None."""
    return UNTOUCHED_BITS if spec is None else spec.bits


def read_roles(entry: object, default: QuantSpec, path: Path) -> RolePlan:
    """Read the entry ``roles`` of a plan file.

    Args:
        entry: As the YAML has it.
        default: Where numbers come from that it leaves out.
        path: Of the file; what it names lies beside it.

    Raises:
        ValueError: Unknown keys, or values that are no spec; the message names file and entry.
    """
    here = f"{path}: roles"
    expect_keys(entry, {*ROLES, "first_blocks"}, here)
    assert isinstance(entry, dict)
    if "router" in entry and entry["router"] != UNTOUCHED_BITS:
        raise ValueError(f"{here}: router must be {UNTOUCHED_BITS}, got {entry['router']!r}: {ROUTER_REASON}")
    plain = {role: value for role, value in entry.items() if role not in ("router", "first_blocks")}
    routed = plain.get("routed_experts")
    by_use = None
    if isinstance(routed, dict) and not {"frequent", "rare", "share", "use"}.isdisjoint(routed):
        del plain["routed_experts"]
        by_use = _read_routed(routed, default, path.parent, f"{here}: routed_experts")
    specs = {role: _touched(value, default, f"{here}: {role}") for role, value in plain.items()}
    first = _read_first(entry["first_blocks"], default, f"{here}: first_blocks") if "first_blocks" in entry else None
    return RolePlan(specs, by_use, first)


def _read_routed(entry: dict[str, Any], default: QuantSpec, folder: Path, where: str) -> RoutedSpecs:
    expect_keys(entry, {"frequent", "rare", "share", "use"}, where)
    missing = [key for key in ("frequent", "rare", "share") if key not in entry]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing: by use needs frequent, rare and share")
    use = entry.get("use")
    if use is not None and not isinstance(use, str):
        raise ValueError(f"{where}: use must name a report's file, got {use!r}")
    frequent, rare = (_touched(entry[key], default, f"{where}: {key}") for key in ("frequent", "rare"))
    try:
        return RoutedSpecs(frequent, rare, entry["share"], None if use is None else read_use(folder / use))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_first(entry: object, default: QuantSpec, where: str) -> FirstBlocks:
    expect_keys(entry, {"count", "bits", "group_size", "symmetric"}, where)
    assert isinstance(entry, dict)
    missing = [key for key in ("count", "bits") if key not in entry]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    rest = {key: value for key, value in entry.items() if key != "count"}
    try:
        return FirstBlocks(entry["count"], _touched(rest, default, where))
    except ValueError as error:
        raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from error


def _touched(entry: object, default: QuantSpec, where: str) -> QuantSpec | None:
    spec = read_spec(entry, default, where)
    return None if spec.untouched else spec
