"""What is quantized, and how finely: frozen values, pure Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

Component = Literal["vision", "connector", "language", "head", "audio"]

COMPONENTS: tuple[Component, ...] = ("vision", "connector", "language", "head")
"""What a plan can ask for. Layers of an audio tower, which no image passes, are touched by rules alone."""

UNTOUCHED_BITS = 16
"""The number of bits that means: leave these weights as the checkpoint has them."""


@dataclass(frozen=True)
class QuantSpec:
    """How the weights of one linear layer are stored.

    Attributes:
        bits: Bits per weight, 2 to 8; 16 leaves the layer as it is.
        group_size: Consecutive input columns of one row that share a scale. None (or -1) means one
            scale for the whole row.
        symmetric: Zero point fixed in the middle of the code range instead of fitted to each group.
    """

    bits: int
    group_size: int | None = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not (2 <= self.bits <= 8 or self.bits == UNTOUCHED_BITS):
            raise ValueError(f"bits must be an integer from 2 to 8, or 16 for untouched, got {self.bits!r}")
        if self.group_size == -1:
            object.__setattr__(self, "group_size", None)
        if self.group_size is not None and (not _is_int(self.group_size) or self.group_size < 1):
            raise ValueError(
                f"group_size must be a positive integer, or -1 for one group per row, got {self.group_size!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {self.symmetric!r}")

    @property
    def untouched(self) -> bool:
        """Whether a layer with this spec keeps its weights."""
        return self.bits == UNTOUCHED_BITS


@dataclass(frozen=True)
class Rule:
    """One exception to the plan of a component, chosen by module name.

    Attributes:
        pattern: Regular expression searched in the full module name (anchor it with ``^`` and ``$``).
        spec: How such modules are stored; None leaves them untouched.
    """

    pattern: str
    spec: QuantSpec | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"plan rule {self.pattern!r} is not a regular expression: {error}") from error

    def matches(self, module_name: str) -> bool:
        """Return whether the rule speaks about this module."""
        return re.search(self.pattern, module_name) is not None


class Assignment(NamedTuple):
    """The plan applied to the linear layers of one model.

    Attributes:
        specs: Module name -> spec, for the layers to quantize.
        reasons: Module name -> why it is left alone, for all the others.
    """

    specs: dict[str, QuantSpec]
    reasons: dict[str, str]


@dataclass(frozen=True)
class QuantPlan:
    """Which spec each linear layer of a model gets.

    A component that is None is left untouched. `skip` patterns win over `rules`; the first matching
    rule wins over the component.
    """

    vision: QuantSpec | None = None
    connector: QuantSpec | None = None
    language: QuantSpec | None = None
    head: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    skip: tuple[str, ...] = ()
    _skips: tuple[Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for component in COMPONENTS:
            spec = getattr(self, component)
            if spec is not None and spec.untouched:
                object.__setattr__(self, component, None)
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
            bits: Bits of the language model unless `language_bits` says otherwise, and of plan rules
                that name none.
            group_size: Columns per scale, for every component; -1 or None for one group per row.
            symmetric: Whether zero points are fixed.
            vision_bits: Bits of the vision tower; 16 leaves it untouched, here and below.
            connector_bits: Bits of the projector between vision and language.
            language_bits: Bits of the decoder layers; None means `bits`.
            head_bits: Bits of the output projection.
            plan: YAML file with ``components``, ``rules`` and ``skip`` (see `from_yaml`); what it says
                replaces the other arguments.

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

        The file holds up to three keys; numbers that an entry leaves out come from `default`::

            components: {vision: 8, language: {bits: 4, group_size: 64}}
            rules:
              - {match: 'layers\.0\.', bits: 8}
              - {match: 'o_proj$', skip: true}
            skip: ['^model\.visual\.merger']

        Raises:
            ValueError: Unknown keys, or values that are no spec; the message names file and entry.
            FileNotFoundError: There is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"plan file {str(path)!r} does not exist")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"plan file {path} is not YAML: {error}") from error
        _expect_keys(content, {"components", "rules", "skip"}, str(path))
        named = content.get("components") or {}
        _expect_keys(named, set(COMPONENTS), f"{path}: components")
        specs: dict[str, Any] = dict(components) | {
            name: _read_spec(entry, default, f"{path}: {name}") for name, entry in named.items()
        }
        entries = content.get("rules") or []
        if not isinstance(entries, list):
            raise ValueError(f"{path}: rules must be a list of mappings, got {entries!r}")
        rules = tuple(_read_rule(entry, default, str(path)) for entry in entries)
        skip = content.get("skip") or []
        if not isinstance(skip, list) or not all(isinstance(pattern, str) for pattern in skip):
            raise ValueError(f"{path}: skip must be a list of regular expressions, got {skip!r}")
        return cls(**specs, rules=rules, skip=tuple(skip))

    @property
    def specs(self) -> tuple[QuantSpec, ...]:
        """Every spec below 16 bits that the plan names."""
        named = [getattr(self, component) for component in COMPONENTS] + [rule.spec for rule in self.rules]
        return tuple(spec for spec in named if spec is not None and not spec.untouched)

    def spec_for(self, module_name: str, component: Component) -> QuantSpec | None:
        """Return the spec of one linear layer, None when it is left untouched."""
        return self._decide(module_name, component)[0]

    def assign(self, components: Mapping[str, Component]) -> Assignment:
        """Apply the plan to a model's linear layers.

        Args:
            components: Module name -> component, of every linear layer.

        Raises:
            ValueError: A rule or skip pattern matches no layer, a component that the plan asks for has
                no layer left to quantize, or nothing at all would be quantized.
        """
        self._expect_matches(components)
        specs: dict[str, QuantSpec] = {}
        reasons: dict[str, str] = {}
        for name, component in components.items():
            spec, reason = self._decide(name, component)
            if spec is None:
                reasons[name] = reason
            else:
                specs[name] = spec
        self._expect_coverage(components, specs)
        return Assignment(specs, reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        components = {name: _write_spec(getattr(self, name)) for name in COMPONENTS}
        rules = [{"match": rule.pattern, "spec": _write_spec(rule.spec)} for rule in self.rules]
        return components | {"rules": rules, "skip": list(self.skip)}

    def _decide(self, name: str, component: Component) -> tuple[QuantSpec | None, str]:
        for rule in (*self._skips, *self.rules):
            if rule.matches(name):
                touched = rule.spec is not None and not rule.spec.untouched
                return (rule.spec if touched else None), f"the plan leaves {rule.pattern!r} at 16 bits"
        return getattr(self, component, None), f"the plan leaves {component} at 16 bits"

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


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect_keys(entry: object, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a mapping with {', '.join(sorted(known))}, got {entry!r}")
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")


def _read_spec(entry: object, default: QuantSpec, where: str) -> QuantSpec:
    entry = {"bits": entry} if isinstance(entry, int) else entry
    _expect_keys(entry, {"bits", "group_size", "symmetric"}, where)
    assert isinstance(entry, dict)
    try:
        return QuantSpec(
            entry.get("bits", default.bits),
            entry.get("group_size", default.group_size),
            entry.get("symmetric", default.symmetric),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_rule(entry: object, default: QuantSpec, where: str) -> Rule:
    _expect_keys(entry, {"match", "skip", "bits", "group_size", "symmetric"}, f"{where}: rule")
    assert isinstance(entry, dict)
    if not isinstance(entry.get("match"), str):
        raise ValueError(f"{where}: rule {entry!r} needs a regular expression under 'match'")
    rest = {key: value for key, value in entry.items() if key not in ("match", "skip")}
    if entry.get("skip"):
        if rest:
            raise ValueError(f"{where}: rule {entry['match']!r} both skips and sets {', '.join(rest)}")
        return Rule(entry["match"], None)
    return Rule(entry["match"], _read_spec(rest, default, f"{where}: rule {entry['match']!r}"))


def _write_spec(spec: QuantSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    return {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
