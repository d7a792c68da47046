"""Validation by pydantic, with its errors reworded in one line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import field, is_dataclass
from functools import wraps
from typing import Annotated, Any, NamedTuple, TypeVar, dataclass_transform, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lmms_plugin.utils.suggest import near, unknown

T = TypeVar("T")
UNNAMED = "\0"
"""Alias of a field or tag of a union that no file can name and no message shows."""
_LONGEST, _LONGEST_PART, _SHORT = 300, 80, 40
"""Maximum characters of a message, and of names and values in it, which may come from a stranger."""


class Expected(NamedTuple):
    """Annotation that states what a type accepts, for any error of pydantic about it.

    Attributes:
        words: Text after "must be".
    """

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Replace pydantic's message by ours."""
        words = {"words": self.words}
        return core_schema.custom_error_schema(
            handler(source), "expected", custom_error_message="{words}", custom_error_context=words
        )


class OneOf(NamedTuple):
    """Annotation of a text that is one of some names; the error names the nearest.

    Attributes:
        names: Function that returns all names, called when there is a text.
        what: Description of the names where they are too many to list; otherwise they are listed.
    """

    names: Callable[[], Collection[str]]
    what: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check a value that was already validated as a text."""
        return core_schema.no_info_before_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        names = self.names()
        if isinstance(value, str) and value in names:
            return value
        words = self.what or f"one of {', '.join(names)}"
        hint = near(value, names) if isinstance(value, str) else ""
        raise PydanticCustomError("expected", "{words}", {"words": words, "near": hint})


# True is not a number, and a number is not a truth value.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Truth = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1), Expected("a text")]


class Schema(BaseModel):
    """Base of schemas of files: no unknown names, and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def left_out() -> Any:
    """Return the default of a field that may be missing but not null."""
    return Field(default=None)


@dataclass_transform(frozen_default=True, field_specifiers=(field, Field))
def validated(kind: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are validated; an invalid value is a `ValueError` of one line."""
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(kind)
    make = made.__init__

    @wraps(make)
    def init(self: T, *args: Any, **named: Any) -> None:
        try:
            make(self, *args, **named)
        except ValidationError as error:
            raise ValueError(Problem.of(error, made).text) from error

    made.__init__ = init
    return made  # type: ignore[no-any-return]


class Problem(NamedTuple):
    """One problem of a value.

    Attributes:
        loc: Names and positions that lead to it.
        text: What was expected there, and what came.
        of_name: Whether the last name itself is the problem.
    """

    loc: tuple[str | int, ...]
    text: str
    of_name: bool

    @classmethod
    def of(cls, error: ValidationError, kind: Any = None, *, noun: str = "key", positions: bool = True) -> Problem:
        """Return the first problem of a pydantic error; arguments as those of `all_of`."""
        return cls.all_of(error, kind, noun=noun, positions=positions)[0]

    @classmethod
    def all_of(
        cls, error: ValidationError, kind: Any = None, *, noun: str = "key", positions: bool = True
    ) -> list[Problem]:
        """Return the problems of a pydantic error; unknown names come first, since they may explain what is missing.

        Args:
            error: Error of pydantic.
            kind: Type to be made, for the names that it knows; None if unknown.
            noun: Noun for an unknown name.
            positions: Whether to name positions in lists, which a line number makes redundant.
        """
        found = error.errors(include_url=False)
        # pydantic counts only the valid values of a list.
        wrong = {one["loc"][:end] for one in found for end in range(len(one["loc"]))}
        found = [one for one in found if one["type"] != "too_short" or one["loc"] not in wrong]
        found.sort(key=lambda one: one["type"] not in _UNKNOWN)
        return [cls._told(one, kind, noun, positions) for one in found]

    @classmethod
    def _told(cls, found: Any, kind: Any, noun: str, positions: bool) -> Problem:
        of_name = found["type"] in (*_UNKNOWN, "invalid_key") or found["loc"][-1:] == (_KEY,)
        path, owners = _followed(kind, found["loc"], inside=found["type"] not in _UNKNOWN)
        path = [*path[:-1], str(path[-1])] if of_name and path else path
        told = [part for part in path if positions or isinstance(part, str)]
        # A position belongs to the name before it.
        cut = max((at for at, part in enumerate(told) if isinstance(part, str)), default=0)
        text = _sentence(found, _path(told[:cut]), _path(told[cut:]), _names(owners), noun)
        return cls(tuple(path), " ".join(text.splitlines()), of_name)


def refused(words: str, *loc: str | int, value: Any = None) -> ValidationError:
    """Return the error of a validator about one part of its input.

    Args:
        words: Full sentence.
        loc: Place of the part in the input.
        value: Value of the part.
    """
    told = PydanticCustomError("sentence", "{words}", {"words": words})
    return ValidationError.from_exception_data("", [{"type": told, "loc": loc, "input": value}])


def shown(value: Any) -> str:
    """Format a value for a message."""
    text = repr(value)
    kinds = {Mapping: "a mapping", list | tuple: "a list"}
    large = next((words for kind, words in kinds.items() if isinstance(value, kind)), f"{text:.{_LONGEST_PART}}")
    return text if len(text) <= _SHORT else large


_KEY = "[key]"
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MAPPINGS = ("model_type", "dataclass_type", "dict_type", "mapping_type")
_WORDS = {
    "bool_type": "True or False",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "invalid_key": "a name",
    "too_short": "a list of at least {min_length}",
    "literal_error": "{expected}",
    "expected": "{words}",
}
"""Type of pydantic's error → what was expected."""


def _sentence(error: Any, parents: str, name: str, known: Sequence[str], noun: str) -> str:
    kind, context = error["type"], error.get("ctx", {})
    before, got = f"{parents}: " if parents else "", shown(error["input"])
    if kind in _UNKNOWN:
        return f"{before}{unknown(noun, name, known) if known else f'unknown {noun} {name!r}'}"
    if kind in ("missing", "missing_argument"):
        return f"{before}{name} is missing"
    before_all = f"{before}{name}: " if name else ""
    if kind in _MAPPINGS:
        return f"{before_all}expected a mapping{' with ' if known else ''}{', '.join(known)}, got {got}"
    if kind in ("value_error", "sentence"):
        return f"{before_all}{str(context.get('error', error['msg']))[:_LONGEST]}"
    if error["loc"][-1:] == (_KEY,) and kind == "expected":
        return f"{before}expected {context['words']}, got {name!r}{context.get('near', '')}"
    words = _WORDS[kind].format(**context) if kind in _WORDS else error["msg"][:_LONGEST]
    return f"{before}{name or 'it'} must be {words}, got {got}{context.get('near', '')}"


def _path(parts: Sequence[str | int]) -> str:
    told = "".join(f"[{part}]" if isinstance(part, int) else f": {part:.{_LONGEST_PART}}" for part in parts)
    return told.removeprefix(": ")


def _followed(kind: Any, loc: tuple[str | int, ...], *, inside: bool) -> tuple[list[str | int], list[type]]:
    """Return the names and positions of a place without pydantic's additions, and the models of the value there.

    Args:
        kind: Type of the whole.
        loc: Place, as pydantic gives it.
        inside: Whether to return the models of the value itself; otherwise of what holds it.
    """
    path: list[str | int] = []
    owners = list(_kinds(kind))
    for at, part in enumerate(loc):
        within = inside or at < len(loc) - 1
        tagged = [owner for owner in owners if owner.__name__ == part]
        if tagged and within:
            owners = tagged
            continue
        if at == 0 and isinstance(part, int) and inside and is_dataclass(kind):
            # The value was given without a name.
            part = next(iter([*_fields(kind)][part:]), part)
        path += [part] if part not in (UNNAMED, _KEY) else []
        if within:
            found = [of[part] for owner in owners if part in (of := _fields(owner))]
            owners = [one for annotation in found for one in _kinds(annotation)] if found else owners
    return path, owners


def _fields(owner: Any) -> dict[str | int, Any]:
    fields = owner.__pydantic_fields__.items()
    return {name if of.validation_alias is None else of.validation_alias: of.annotation for name, of in fields}


def _names(owners: Sequence[type]) -> list[str]:
    return list(dict.fromkeys(str(name) for owner in owners for name in _fields(owner) if name != UNNAMED))


def _kinds(annotation: Any) -> Iterator[type]:
    """Yield the models within an annotation."""
    if hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _kinds(part)
