"""Quantization plans, from command line or YAML file to one spec per layer: frozen values, pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import regex
from pydantic import AfterValidator, model_validator

from lmms_plugin.quant_backends.plans.role_plan import ROUTER_REASON, DecoderPosition, RolePlan
from lmms_plugin.quant_backends.plans.specs import (
    UNTOUCHED_BITS,
    Bits,
    GroupSize,
    PlannedSpec,
    QuantSpec,
    touched,
    with_bits,
    write_spec,
)
from lmms_plugin.utils.reading.located import load
from lmms_plugin.utils.reading.validation import Expected, OneOf, Schema, Truth, left_out, validated

__all__ = ["COMPONENTS", "UNTOUCHED_BITS", "Assignment", "Component", "QuantPlan", "QuantSpec", "Rule"]

Component = Literal["vision", "connector", "language", "head", "audio", "unused"]

COMPONENTS: tuple[Component, ...] = ("vision", "connector", "language", "head")
"""What a plan can ask for. An audio tower and unused layers, which neither image nor answer passes, need rules."""

MOST_LETTERS, MOST_SECONDS = 1000, 2.0
"""Of a rule's regular expression, and of its search in one name."""


def named_in(path: str | Path) -> frozenset[str]:
    """Return the fields of a spec that a plan file names, wherever in the file; the rest comes from defaults.

    Raises:
        ValueError: The file is not YAML.
        FileNotFoundError: There is no such file.
    """
    known = {one.name for one in fields(QuantSpec)}
    left, found = [load(Path(path)).plain()], set[str]()
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found |= known & one.keys()
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return frozenset(found)


def _compiles(pattern: str) -> str:
    if len(pattern) > MOST_LETTERS:
        raise ValueError(f"plan rule {pattern[:60]!r}... is longer than {MOST_LETTERS} letters")
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"plan rule {pattern!r} is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[Annotated[str, Expected("a regular expression")], AfterValidator(_compiles)]


@validated
class Rule:
    """Exception to the spec of a component, chosen by module name.

    Attributes:
        pattern: Regular expression searched in the full module name (anchor it with ``^`` and ``$``).
        spec: Spec of matching modules; None leaves them untouched.
    """

    pattern: Pattern
    spec: QuantSpec | None

    def matches(self, module_name: str) -> bool:
        """Return whether the rule applies to this module.

        Raises:
            ValueError: Nested repetitions make the search take too long.
        """
        try:
            return regex.search(self.pattern, module_name, timeout=MOST_SECONDS) is not None
        except TimeoutError as error:
            raise ValueError(
                f"plan rule {self.pattern!r} took more than {MOST_SECONDS:g} s on {module_name!r}: expected a regular"
                " expression without repetitions of repetitions"
            ) from error


class Assignment(NamedTuple):
    """Plan applied to the linear layers of one model.

    Attributes:
        specs: Module name -> spec, for the layers to quantize.
        reasons: Module name -> reason why it is left dense, for all the others.
    """

    specs: dict[str, QuantSpec]
    reasons: dict[str, str]


class _RuleEntry(Schema):
    """Rule of a plan file; numbers that it omits come from the default."""

    match: Pattern
    skip: Truth = False
    bits: Bits = left_out()
    group_size: GroupSize = None
    symmetric: Truth = left_out()
    format: str = left_out()
    activation_format: str = left_out()

    @model_validator(mode="before")
    @classmethod
    def _with_bits(cls, entry: Any) -> Any:
        return with_bits(entry) if isinstance(entry, dict) else entry

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.skip and self._spec:
            raise ValueError(f"rule {self.match!r} both skips and sets {', '.join(self._spec)}")
        return self

    @property
    def _spec(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, exclude={"match", "skip"})

    def rule(self, default: QuantSpec) -> Rule:
        return Rule(self.match, None if self.skip else replace(default, **self._spec))


class _PlanFile(Schema):
    components: dict[Annotated[str, OneOf(lambda: COMPONENTS)], PlannedSpec] | None = None
    roles: RolePlan | None = None
    rules: tuple[_RuleEntry, ...] | None = None
    skip: tuple[Pattern, ...] | None = None


@validated
class QuantPlan:
    """Specs of a model's linear layers, by component, role and module name.

    A component that is None is left untouched. `skip` patterns override `rules`, the first matching rule overrides
    `roles`, and a role overrides the component. Routers are never quantized.
    """

    vision: QuantSpec | None = None
    connector: QuantSpec | None = None
    language: QuantSpec | None = None
    head: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    skip: tuple[str, ...] = ()
    roles: RolePlan | None = None
    _skips: tuple[Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for component in COMPONENTS:
            object.__setattr__(self, component, touched(getattr(self, component)))
        object.__setattr__(self, "_skips", tuple(Rule(pattern, None) for pattern in self.skip))

    @classmethod
    def from_arguments(
        cls,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        vision_bits: int = UNTOUCHED_BITS,
        connector_bits: int = UNTOUCHED_BITS,
        language_bits: int | None = None,
        head_bits: int = UNTOUCHED_BITS,
        plan: str | Path | None = None,
    ) -> QuantPlan:
        """Build a plan from the model arguments of the command line.

        Args:
            bits: Number of bits of the language model unless `language_bits` says otherwise, and of plan rules that
                name none.
            group_size: Number of columns per scale, for every component; -1 or None for one group per row.
            symmetric: Whether zero points are fixed.
            vision_bits: Number of bits of the vision tower; 16 leaves it untouched, here and below.
            connector_bits: Number of bits of the projector between vision and language.
            language_bits: Number of bits of the decoder layers; None means `bits`.
            head_bits: Number of bits of the output projection.
            plan: YAML file with ``components``, ``roles``, ``rules`` and ``skip`` (see `from_yaml`), which replaces the
                other arguments.

        Raises:
            ValueError: A number or the file's content is not valid.
            FileNotFoundError: `plan` names no file.
        """
        default = QuantSpec(bits, group_size, symmetric)
        asked = {
            "vision": vision_bits,
            "connector": connector_bits,
            "language": bits if language_bits is None else language_bits,
            "head": head_bits,
        }
        components: dict[str, Any] = {name: QuantSpec(n, group_size, symmetric) for name, n in asked.items()}
        if plan is None:
            return cls(**components)
        return cls.from_yaml(plan, default=default, **components)

    @classmethod
    def from_yaml(cls, path: str | Path, *, default: QuantSpec, **components: QuantSpec) -> QuantPlan:
        r"""Read a plan file.

        The file holds up to four keys; numbers that an entry leaves out come from `default`::

            components: {vision: 8, language: {bits: 4, group_size: 64}}
            roles:
              attention: {format: fp8_e4m3, activation_format: fp8_e4m3}
              routed_experts: {frequent: 4, rare: 2, share: 0.25}
              first_blocks: {count: 2, bits: 8}
            rules:
              - {match: 'layers\.0\.', bits: 8}
              - {match: 'o_proj$', skip: true}
            skip: ['^model\.visual\.merger']

        Raises:
            ValueError: Unknown keys, or values that are no spec; every problem is a line that names file and entry.
            FileNotFoundError: There is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"plan file {str(path)!r} does not exist")
        read = load(path).validated(_PlanFile, default=default, folder=path.parent)
        specs: dict[str, Any] = components | (read.components or {})
        roles = read.roles if read.roles is not None and read.roles.model_fields_set else None
        rules = tuple(one.rule(default) for one in read.rules or ())
        return cls(**specs, rules=rules, skip=read.skip or (), roles=roles)

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """Return every spec below 16 bits that the plan names."""
        named = [getattr(self, component) for component in COMPONENTS] + [rule.spec for rule in self.rules]
        named += () if self.roles is None else self.roles.named
        return tuple(spec for spec in named if spec is not None and not spec.untouched)

    def spec_for(
        self, module_name: str, component: Component, place: DecoderPosition | None = None
    ) -> QuantSpec | None:
        """Return the spec of one linear layer, of which its place in the decoder may be known; None for untouched."""
        return self._decide(module_name, component, place)[0]

    @property
    def counts_use(self) -> bool:
        """Return whether specs depend on the experts' shares of the calibration tokens."""
        return self.roles is not None and self.roles.routed is not None and self.roles.routed.use is None

    def assign(
        self,
        components: Mapping[str, Component],
        places: Mapping[str, DecoderPosition] | None = None,
        use: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Assignment:
        """Apply the plan to a model's linear layers.

        Args:
            components: Module name -> component, of every linear layer.
            places: Module name -> place, of the decoder's layers.
            use: Module name -> tokens sent to each of its experts; None as long as they are not counted, when experts
                whose spec depends on it get the finer one.

        Raises:
            ValueError: A rule or skip pattern matches no layer, no layer plays a role, a component that the plan asks
                for has no layer left to quantize, or nothing at all would be quantized.
        """
        places = places or {}
        self._expect_matches(name for name in components if name not in places or places[name].role != "router")
        if self.roles is not None:
            self.roles.expect_roles(places)
        specs: dict[str, QuantSpec] = {}
        reasons: dict[str, str] = {}
        for name, component in components.items():
            spec, reason = self._decide(name, component, places.get(name), use)
            if spec is None:
                reasons[name] = reason
            else:
                specs[name] = spec
        self._expect_coverage(components, specs)
        return Assignment(specs, reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        components = {name: write_spec(getattr(self, name)) for name in COMPONENTS}
        rules = [{"match": rule.pattern, "spec": write_spec(rule.spec)} for rule in self.rules]
        roles = {} if self.roles is None else {"roles": self.roles.to_dict()}
        return components | roles | {"rules": rules, "skip": list(self.skip)}

    def _decide(
        self,
        name: str,
        component: Component,
        place: DecoderPosition | None = None,
        use: Mapping[str, tuple[int, ...]] | None = None,
    ) -> tuple[QuantSpec | None, str]:
        if place is not None and place.role == "router":
            return None, ROUTER_REASON
        for rule in (*self._skips, *self.rules):
            if rule.matches(name):
                touched = rule.spec is not None and not rule.spec.untouched
                return (rule.spec if touched else None), f"the plan leaves {rule.pattern!r} at 16 bits"
        spec, entry = getattr(self, component, None), None
        if place is not None and self.roles is not None:
            spec, entry = self.roles.decide(place, spec, use)
        return spec, f"the plan leaves {entry or component} at 16 bits"

    def _expect_matches(self, names: Iterable[str]) -> None:
        names = list(names)
        for rule in (*self._skips, *self.rules):
            if not any(rule.matches(name) for name in names):
                examples = ", ".join(names[:3])
                raise ValueError(
                    f"plan rule {rule.pattern!r} matches no linear layer (layers are named like {examples})"
                )

    def _expect_coverage(self, components: Mapping[str, Component], specs: Mapping[str, QuantSpec]) -> None:
        covered = {components[name] for name in specs}
        for component in COMPONENTS:
            if getattr(self, component) is not None and component not in covered:
                present = component in components.values()
                why = "skip and rules leave none of its layers" if present else "it has no nn.Linear"
                raise ValueError(f"the plan asks to quantize {component}, but in this model {why}")
        if not specs:
            raise ValueError("the plan quantizes nothing: every component is at 16 bits and no rule asks for less")
