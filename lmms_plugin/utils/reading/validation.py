"""Values that pydantic checks, and what it finds wrong with one in a line of our own words."""

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
"""As the alias of a field or the tag of a union: no file has such a name, and no message tells it."""
_LONGEST, _LONGEST_PART, _SHORT = 300, 80, 40
"""Characters of a message and of a name or value in it, which may be a stranger's."""


class Expected(NamedTuple):
    """Says in our own words what a type takes, whatever of it pydantic finds wrong.

    Attributes:
        words: Behind "must be".
    """

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Put our words in place of pydantic's."""
        words = {"words": self.words}
        return core_schema.custom_error_schema(
            handler(source), "expected", custom_error_message="{words}", custom_error_context=words
        )


class OneOf(NamedTuple):
    """Says that a text is one of some names; a refusal names the nearest.

    Attributes:
        names: All of them, asked for when there is a text.
        what: Where there are too many to list, what they are; otherwise they are listed.
    """

    names: Callable[[], Collection[str]]
    what: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check what was found to be a text."""
        return core_schema.no_info_before_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        names = self.names()
        if isinstance(value, str) and value in names:
            return value
        words = self.what or f"one of {', '.join(names)}"
        hint = near(value, names) if isinstance(value, str) else ""
        raise PydanticCustomError("expected", "{words}", {"words": words, "near": hint})


# True is no number, and a number no truth value.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Truth = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1), Expected("a text")]


class Schema(BaseModel):
    """What a file may say: no other names than the fields', and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def left_out() -> Any:
    """The default of a field that may be missing, for which null is no value."""
    return Field(default=None)


@dataclass_transform(frozen_default=True, field_specifiers=(field, Field))
def validated(kind: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are checked; making one of something else is a `ValueError` of one line."""
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
    """The first thing that is wrong with a value.

    Attributes:
        loc: Names and positions that lead to it.
        text: What was expected there, and what came.
        of_name: Whether the last name itself is what is wrong.
    """

    loc: tuple[str | int, ...]
    text: str
    of_name: bool

    @classmethod
    def of(cls, error: ValidationError, kind: Any = None, *, noun: str = "key", positions: bool = True) -> Problem:
        """Tell it of one of pydantic's errors; an unknown name comes first, since it may explain what is missing.

        Args:
            error: Of pydantic.
            kind: That was to be made, for the names that it knows; None where that is not known.
            noun: What an unknown name was to be the name of.
            positions: Whether positions in lists are told, which a number of a line makes needless.
        """
        found = error.errors(include_url=False)
        first = next((one for one in found if one["type"] in _UNKNOWN), found[0])
        of_name = first["type"] in (*_UNKNOWN, "invalid_key") or first["loc"][-1:] == (_KEY,)
        path, owners = _followed(kind, first["loc"], inside=first["type"] not in _UNKNOWN)
        path = [*path[:-1], str(path[-1])] if of_name and path else path
        told = [part for part in path if positions or isinstance(part, str)]
        # A position belongs to the name before it.
        cut = max((at for at, part in enumerate(told) if isinstance(part, str)), default=0)
        text = _sentence(first, _path(told[:cut]), _path(told[cut:]), _names(owners), noun)
        return cls(tuple(path), " ".join(text.splitlines()), of_name)


def refused(words: str, *loc: str | int, value: Any = None) -> ValidationError:
    """The error of a validator about one part of what it was given.

    Args:
        words: The whole sentence.
        loc: Where the part is in it.
        value: Of the part.
    """
    told = PydanticCustomError("sentence", "{words}", {"words": words})
    return ValidationError.from_exception_data("", [{"type": told, "loc": loc, "input": value}])


def shown(value: Any) -> str:
    """A value as a message shows it."""
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
"""Kind of pydantic's error → what was expected."""


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
    """The names and positions of a place without what pydantic puts between them, and the models of what is there.

    Args:
        kind: Of the whole.
        loc: Of the place, as pydantic tells it.
        inside: Whether the models are those of what is there; otherwise of what holds it.
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
            # What was given without a name.
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
    """The models within an annotation."""
    if hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _kinds(part)
