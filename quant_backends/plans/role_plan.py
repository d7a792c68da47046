"""Bits by the role of a layer in the decoder (arXiv:2406.08155): frozen values, pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo

from lmms_plugin.quant_backends.plans.expert_use import read_use
from lmms_plugin.quant_backends.plans.specs import (
    UNTOUCHED_BITS,
    Bits,
    GroupSize,
    PlannedSpec,
    QuantSpec,
    filled,
    touched,
    write_spec,
)
from lmms_plugin.utils.reading.validation import Expected, Number, Schema, Truth, Whole, left_out

Role = Literal["attention", "mlp", "shared_expert", "routed_experts", "router"]

ROLES: tuple[Role, ...] = ("attention", "mlp", "shared_expert", "routed_experts", "router")
"""The roles of a decoder's layers; `mlp` is the feed-forward part of blocks without experts."""

ROUTER_REASON = "a router decides which experts run and is never quantized"


class DecoderPosition(NamedTuple):
    """Position of a layer in the decoder.

    Attributes:
        role: Role of the layer.
        block: Number of its block, from 0.
        experts: Name of the module that holds all experts of its layer; None for other roles.
        expert: Number of its expert; None for other roles.
    """

    role: Role
    block: int
    experts: str | None = None
    expert: int | None = None


def _counted(use: Any, info: ValidationInfo[Mapping[str, Any]]) -> Any:
    try:
        return read_use(info.context["folder"] / use) if isinstance(use, str) else use
    except FileNotFoundError as error:
        # pydantic collects this one beside the others of the file.
        raise ValueError(str(error)) from error


class RoutedSpecs(Schema):
    """Specs of routed experts by the number of tokens they are sent.

    Attributes:
        frequent: Spec of the most used experts of each layer.
        rare: Spec of all others.
        share: Fraction of a layer's experts that counts as frequent, in (0, 1); at least one expert does.
        use: Module name -> tokens of each of its experts, counted before; a plan names the report that holds them. None
            counts calibration tokens.
    """

    frequent: PlannedSpec
    rare: PlannedSpec
    share: Annotated[Number, Field(gt=0, lt=1), Expected("a fraction between 0 and 1")]
    use: Annotated[
        Annotated[Mapping[str, tuple[int, ...]] | None, Expected("the name of a report's file")],
        BeforeValidator(_counted),
    ] = None

    def of(self, expert: int, tokens: tuple[int, ...]) -> QuantSpec:
        """Return the spec of one expert.

        Args:
            expert: Number of the expert.
            tokens: Numbers of tokens sent to each expert of its layer; ties go to the lower number.
        """
        ranking = sorted(range(len(tokens)), key=lambda index: (-tokens[index], index))
        return self.frequent if expert in ranking[: max(1, math.ceil(self.share * len(tokens)))] else self.rare


class FirstBlocks(Schema):
    """Minimum bits of layers in the first blocks.

    Attributes:
        count: Number of blocks, 1 or more.
        bits: Number of bits that a layer gets if its other rules ask for fewer.
        group_size: Group size, as in `QuantSpec`.
        symmetric: Symmetry, as in `QuantSpec`.
    """

    count: Annotated[Whole, Field(ge=1), Expected("a positive integer")]
    bits: Bits
    group_size: GroupSize
    symmetric: Truth

    @property
    def spec(self) -> QuantSpec:
        """Return the spec of such a layer."""
        return QuantSpec(self.bits, self.group_size, self.symmetric)


def _routed_as(entry: Any) -> str:
    return "RoutedSpecs" if isinstance(entry, dict) and RoutedSpecs.model_fields.keys() & entry else "QuantSpec"


class RolePlan(Schema):
    """Specs by role, for layers of the decoder: the entry ``roles`` of a plan file.

    Attributes:
        attention: Spec of attention projections. An omitted role follows the component, here and below.
        mlp: Spec of the feed-forward part of blocks without experts.
        shared_expert: Spec of experts that every token is sent to.
        routed_experts: Spec of all routed experts, or specs by their use.
        router: Spec of routers, which stay untouched in any case.
        first_blocks: Minimum bits of the first blocks; if omitted, they are treated like all others.
    """

    attention: PlannedSpec = left_out()
    mlp: PlannedSpec = left_out()
    shared_expert: PlannedSpec = left_out()
    routed_experts: Annotated[
        Annotated[PlannedSpec, Tag("QuantSpec")] | Annotated[RoutedSpecs, Tag("RoutedSpecs")], Discriminator(_routed_as)
    ] = left_out()
    router: Annotated[
        Annotated[Whole, Field(ge=UNTOUCHED_BITS, le=UNTOUCHED_BITS)], Expected(f"{UNTOUCHED_BITS} ({ROUTER_REASON})")
    ] = UNTOUCHED_BITS
    first_blocks: Annotated[FirstBlocks, filled("group_size", "symmetric")] = left_out()

    @property
    def asked(self) -> tuple[Role, ...]:
        """Return the roles that the plan names, without routers."""
        return tuple(role for role in ROLES if role != "router" and role in self.model_fields_set)

    @property
    def routed(self) -> RoutedSpecs | None:
        """Return the specs of routed experts by use; None where all experts share one spec."""
        return self.routed_experts if isinstance(self.routed_experts, RoutedSpecs) else None

    @property
    def specs(self) -> dict[Role, QuantSpec]:
        """Return role -> spec, for roles whose layers share one spec."""
        return {role: spec for role in self.asked if isinstance(spec := getattr(self, role), QuantSpec)}

    @property
    def named(self) -> tuple[QuantSpec, ...]:
        """Return every spec that the plan names."""
        routed = () if self.routed is None else (self.routed.frequent, self.routed.rare)
        first = () if self.first_blocks is None else (self.first_blocks.spec,)
        return (*self.specs.values(), *routed, *first)

    def decide(
        self, place: DecoderPosition, default: QuantSpec | None, use: Mapping[str, tuple[int, ...]] | None
    ) -> tuple[QuantSpec | None, str | None]:
        """Return the spec of a layer and the plan entry that decided it, None for an entry if it is the default.

        Args:
            place: Position of the layer.
            default: Spec of its component.
            use: Module name -> tokens of each of its experts. None where they are not counted yet: experts then get the
                finer of their two specs.
        """
        spec, entry = default, None if place.role not in self.asked else str(place.role)
        if place.role == "routed_experts" and self.routed is not None:
            spec = self._by_use(place, use)
        elif place.role in self.specs:
            spec = touched(self.specs[place.role])
        first = self.first_blocks
        if first is not None and place.block < first.count and bits_of(spec) < bits_of(first.spec):
            return touched(first.spec), "first_blocks"
        return spec, entry

    def _by_use(self, place: DecoderPosition, use: Mapping[str, tuple[int, ...]] | None) -> QuantSpec | None:
        assert self.routed is not None
        assert place.experts is not None
        assert place.expert is not None
        use = self.routed.use or use
        if use is None:
            return touched(max(self.routed.frequent, self.routed.rare, key=bits_of))
        if place.experts not in use:
            raise ValueError(
                f"roles: routed_experts: tokens were counted for {len(use)} layers like {next(iter(use), 'none')}, but "
                f"not for {place.experts} of this model"
            )
        tokens = use[place.experts]
        if place.expert >= len(tokens):
            raise ValueError(f"{place.experts} has more experts than the {len(tokens)} that tokens were counted for")
        return touched(self.routed.of(place.expert, tokens))

    def expect_roles(self, places: Mapping[str, DecoderPosition]) -> None:
        """Refuse a plan for roles that a model does not have.

        Raises:
            ValueError: No layer plays a role that the plan names, or the model has fewer blocks than the plan counts.
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
        written: dict[str, Any] = {role: write_spec(touched(spec)) for role, spec in self.specs.items()}
        if self.routed is not None:
            frequent, rare = (write_spec(touched(spec)) for spec in (self.routed.frequent, self.routed.rare))
            written["routed_experts"] = {**self.routed.model_dump(mode="json"), "frequent": frequent, "rare": rare}
        if self.first_blocks is not None:
            spec = write_spec(touched(self.first_blocks.spec))
            written["first_blocks"] = {"count": self.first_blocks.count, "spec": spec}
        return written


def bits_of(spec: QuantSpec | None) -> int:
    """Return the bits of a spec, those of an untouched weight for None."""
    return UNTOUCHED_BITS if spec is None else spec.bits
