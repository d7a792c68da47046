"""Schema of a study file, as pydantic models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Annotated, Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    AliasGenerator,
    BeforeValidator,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lmms_plugin.arguments import ModelArguments, without_idle_cache
from lmms_plugin.quant_backends import SERVED, names, option_types
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.plans.plan import COMPONENTS, UNTOUCHED_BITS
from lmms_plugin.quant_backends.plans.specs import Bits
from lmms_plugin.study.file import served_arms
from lmms_plugin.study.file.grid import CellAxes, Count, Resources
from lmms_plugin.utils.image_slices import MOST
from lmms_plugin.utils.reading.located import Entry
from lmms_plugin.utils.reading.validation import UNNAMED, Expected, OneOf, Schema, Text, Whole, left_out, refused
from lmms_plugin.utils.suggest import near

T = TypeVar("T")
_Images = Annotated[Whole, Field(ge=1, le=MOST), Expected(f"a whole number from 1 to {MOST}")]
ALL = ("vision", "connector", "language")
"""Components that `components: all` quantizes: all but the output projection, which has its own name (`head`)."""
PATHS = ("pretrained", "plan", "selector", "system_prompt")
_TAKEN = (
    *("bits", *(f"{part}_bits" for part in COMPONENTS), "group_size"),
    *("calibration", "calibration_samples", "seed", "batch_size", "report"),
)


class At(NamedTuple, Generic[T]):
    """A value and its place in the study file (file:line:column)."""

    value: T
    where: str


class _Where:
    """Annotation that reads a value with its place from an `Entry`; a model of a part of the file reads the entry."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (kind,) = get_args(source)
        whole = isinstance(kind, type) and issubclass(kind, StudyPart)

        def made(entry: Entry, check: Callable[[Any], T]) -> At[T]:
            return At(check(entry if whole else entry.plain()), entry.where)

        return core_schema.no_info_wrap_validator_function(made, handler.generate_schema(kind))


class StudyPart(Schema):
    """A part of a study file; fields with places are read from entries, all others from plain values."""

    @model_validator(mode="before")
    @classmethod
    def _opened(cls, entry: Any) -> Any:
        if not isinstance(entry, Entry) or not entry.is_mapping:
            return entry
        placed = {
            of.validation_alias or name
            for name, of in cls.model_fields.items()
            if any(isinstance(one, Placed) for one in of.metadata)
        }
        return {name: one if name in placed else one.plain() for name, one in entry.fields().items()}


class Placed(NamedTuple):
    """Annotation of a field that is read from its entry.

    Attributes:
        read: Function of entry and validator of a plain value that returns the field's value.
        kind: Type that the validator accepts; None for the field's own type.
    """

    read: Callable[[Entry, Callable[[Any], Any]], Any]
    kind: Any = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Read the entry around the validator."""
        inner = handler(source) if self.kind is None else handler.generate_schema(self.kind)
        return core_schema.no_info_wrap_validator_function(self.read, inner)


def _once(found: tuple[At[Any], ...], numbers: Iterable[int] | None = None) -> tuple[At[Any], ...]:
    """Refuse two equal values, or two values of one name.

    Args:
        found: Values of an axis.
        numbers: Indices of the entries that they come from, where one entry gives several values.
    """
    for place, (one, number) in enumerate(zip(found, numbers or range(len(found)), strict=True)):
        if any(one.value == other.value for other in found[:place]):
            raise refused("expected every value once, got this one twice", number)
        name = getattr(one.value, "name", None)
        if name is not None and any(name == other.value.name for other in found[:place]):
            told = f"expected a name each, got two called {name!r}: name one of them ({{name: ..., ...}})"
            raise refused(told, number)
    return found


_ITEMS = Placed(lambda entry, check: check(entry.items()))
_Here = Annotated[At[T], _Where()]
_Several = Annotated[tuple[_Here[T], ...], Field(min_length=1)]
Axis = Annotated[_Several[T], AfterValidator(_once), _ITEMS]
"""Values of an axis, each with its place; a single value counts as a list."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _fit_for_a_command_line(value: Any) -> Any:
    # lmms-eval splits arguments at commas.
    if not isinstance(value, str | int | float) or set(str(value)) & set(",\"'{}[]"):
        raise ValueError(value)
    return value


Argument = Annotated[
    Any,
    AfterValidator(_fit_for_a_command_line),
    Expected("a number, True, False, or a text without commas, quotes and brackets"),
]


def _expect_known(given: dict[str, Any], options: Collection[str] = ()) -> dict[str, Any]:
    """Refuse names that are not model arguments, or that are set elsewhere in the study file.

    Args:
        given: Name → value.
        options: Names of the method's options, which are allowed as well.
    """
    own = (field.name for field in fields(ModelArguments) if field.name not in (*_TAKEN, "options"))
    known = [*own, *options]
    for name, value in given.items():
        expected = "a text" if name in PATHS else "a model argument or an option of a method"
        got = repr(value) if name in PATHS else f"{name!r}{near(name, known)}"
        if name in _TAKEN:
            expected = "a model argument that is no axis of the study and no file of its own"
        elif name in known and (name not in PATHS or (isinstance(value, str) and value)):
            continue
        raise refused(f"expected {expected}, got {got}", name, value=value)
    return given


Arguments = Annotated[dict[Text, Argument], AfterValidator(_expect_known)]
_REST: Any = Field(validation_alias=UNNAMED)
"""Field that collects the other entries of its mapping."""


class Model(Schema):
    """A checkpoint: its name or folder, or a mapping with that as `pretrained` and further model arguments.

    Attributes:
        name: Name in tables.
        arguments: Model arguments, `pretrained` among them.
    """

    name: Text
    arguments: Arguments = _REST

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, value: Any) -> Any:
        value = {"pretrained": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        if "pretrained" not in value:
            raise ValueError("pretrained is missing")
        rest = {key: one for key, one in value.items() if key != "name"}
        return {"name": value.get("name", str(rest["pretrained"]).rstrip("/").rsplit("/", 1)[-1]), UNNAMED: rest}


class Method(Schema):
    """A quantizer: its name, or a mapping with that as `method` and options; `served` for models of a server.

    Attributes:
        name: Name in tables; that of the backend unless the method has options or a name of its own.
        backend: Backend as in `quant_<backend>`.
        launch: Command that starts the server of a served model, or file that holds it.
        options: Options of the backend, and model arguments.
    """

    name: Text
    backend: Annotated[str, OneOf(lambda: (*names(), SERVED))] = Field(validation_alias="method")
    launch: Text = left_out()
    options: dict[Text, Argument] = _REST

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, value: Any) -> Any:
        value = {"method": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        rest = without_idle_cache({key: one for key, one in value.items() if key not in ("name", "method", "launch")})
        value = {key: one for key, one in value.items() if key in ("name", "method", "launch")} | rest
        told = (f"{key}={one}" for key, one in rest.items() if key != "base_url")
        named = "+".join([str(value.get("method")), *told])
        return {"name": named, **{key: one for key, one in value.items() if key not in rest}, UNNAMED: rest}

    @model_validator(mode="after")
    def _understood(self) -> Self:
        if self.backend != SERVED:
            if self.launch is not None:
                raise refused(f"expected launch for method: {SERVED} alone, got it for {self.backend}", "launch")
            _expect_known(self.options, option_types(self.backend))
            if self.name == "none" and any(name.startswith("kv_") for name in self.options):
                raise refused("expected another name than that of the unquantized model, got 'none'", "name")
            return self
        if (self.launch is None) == ("base_url" not in self.options):
            got = "both" if self.launch is not None else "neither"
            raise ValueError(f"expected launch (a command that starts the server) or base_url, got {got}")
        own = {name: value for name, value in self.options.items() if name != "bits"}
        _expect_known(own, served_arms.OPTIONS)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Model arguments that the method adds to those of its model."""
        launch = {} if self.launch is None else {"launch": self.launch}
        return launch | {served_arms.STATED.get(name, name): value for name, value in self.options.items()}


@dataclass(frozen=True)
class Components:
    """Components of a model that are quantized.

    Attributes:
        name: Name in tables.
        chosen: Components quantized to the bits of the axis; empty where `bits` sets all.
        bits: Component → bits, 16 for untouched, which override the axis; empty where `chosen` sets all.
    """

    name: str
    chosen: tuple[str, ...] = ()
    bits: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str) -> Components:
        """Parse several components joined by +, or `all`."""
        chosen = ALL if name == "all" else tuple(name.split("+"))
        for part in chosen:
            if part not in COMPONENTS or chosen.count(part) > 1:
                known = (*COMPONENTS, "all")
                expected = f"{', '.join(known)}, several joined by +, or a mapping from component to bits"
                raise ValueError(f"expected {expected}, got {name!r}{near(part, known)}")
        return cls(name, chosen)


_BitsOfOne = Annotated[
    tuple[Annotated[Bits, BeforeValidator(lambda bits: UNTOUCHED_BITS if bits is None else bits)], ...],
    Field(min_length=1),
    BeforeValidator(_listed),
]
_BitsOf = Annotated[dict[Annotated[str, OneOf(lambda: COMPONENTS)], _BitsOfOne], Field(min_length=1)]
"""Component → bits; lists stand for every combination that quantizes anything."""


def _chosen(choice: Mapping[str, tuple[int, ...]] | str) -> list[Components]:
    if isinstance(choice, str):
        return [Components.named(choice)]
    found = [dict(zip(choice, bits, strict=True)) for bits in product(*choice.values())]
    quantized = [bits for bits in found if set(bits.values()) != {UNTOUCHED_BITS}]
    if not quantized:
        got = "none: without quantization the method is none"
        raise ValueError(f"expected a component with less than 16 bits, got {got}")
    untouched: dict[str, int] = dict.fromkeys(COMPONENTS, UNTOUCHED_BITS)
    return [
        Components("-".join(f"{name}{count}" for name, count in bits.items()), bits=untouched | bits)
        for bits in quantized
    ]


def _each(found: tuple[At[list[Components]], ...]) -> tuple[At[Components], ...]:
    flat = [(At(one, at.where), number) for number, at in enumerate(found) for one in at.value]
    return _once(tuple(at for at, _ in flat), [number for _, number in flat])


_Choice = Annotated[
    Annotated[_BitsOf, Tag(UNNAMED)] | Annotated[str, Tag("str")],
    Discriminator(lambda value: "str" if isinstance(value, str) else UNNAMED),
    AfterValidator(_chosen),
]
_Choices = Annotated[_Several[_Choice], AfterValidator(_each)]


def _source(source: str) -> str:
    if source == "none":
        told = "got 'none': methods without calibration are rtn, hqq and such"
        raise ValueError(f"expected a source of calibration inputs, {told}")
    try:
        CalibrationSpec.parse(source)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    return source


class Calibration(Schema):
    """Source of calibration inputs: its name, or a mapping with that as `source`.

    Attributes:
        name: Name in tables.
        source: Source as in `--model_args calibration=`.
        samples: Number of samples; None for the package's default.
    """

    name: Text
    source: Annotated[Text, AfterValidator(_source)]
    samples: Count = left_out()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = {"source": value} if isinstance(value, str) else value
        return {"name": value.get("source"), **value} if isinstance(value, dict) else value


_TaskList = Annotated[tuple[Text, ...], Field(min_length=1)]
_Wanted = Annotated[
    tuple[Annotated[str | int | float | bool | None, Expected("a single value")], ...],
    Field(min_length=1),
    BeforeValidator(_listed),
]


class Exclusion(Schema):
    """Cells that are not run: those whose axes have the values given here.

    Attributes:
        model: Names of models; likewise for the other axes. An axis that is not given matches any value.
        task: Tasks that matching cells leave out; empty to leave out the cells.
    """

    model: _Wanted = left_out()
    method: _Wanted = left_out()
    bits: _Wanted = left_out()
    group_size: _Wanted = left_out()
    components: _Wanted = left_out()
    calibration: _Wanted = left_out()
    seed: _Wanted = left_out()
    task: Annotated[_TaskList, BeforeValidator(_listed)] = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"expected one of {', '.join(Exclusion.model_fields)}, got nothing")
        return self

    def matches(self, axes: CellAxes) -> bool:
        """Return whether the exclusion matches a cell."""
        return all(getattr(axes, axis) in getattr(self, axis) for axis in self.model_fields_set - {"task"})


def _processes(entry: Entry, check: Callable[[Any], tuple[Any, ...]]) -> tuple[At[tuple[str, ...]], ...]:
    """Read the tasks of one process; a list of lists stands for several processes."""
    found = check(_listed(entry.plain()))
    lists = {isinstance(one, tuple) for one in found}
    if len(lists) > 1:
        raise ValueError("expected tasks, or lists of tasks, each for a process of its own, got both")
    several, places = (found, entry.items()) if True in lists else ([found], [entry])
    return tuple(At(tuple(dict.fromkeys(some)), one.where) for some, one in zip(several, places, strict=True))


_TaskLists = Annotated[
    tuple[Annotated[Text | _TaskList, Expected("a task, or a list of tasks")], ...], Field(min_length=1)
]


GroupSize = Annotated[
    Annotated[Whole, Field(ge=1)] | Annotated[Whole, Field(ge=-1, le=-1)],
    Expected("a whole number of columns from 1, or -1 for a whole row"),
]
Seed = Annotated[Whole, Field(ge=0), Expected("a whole number from 0")]


class Crossed(StudyPart):
    """Axes whose product is run, and how it is run.

    Attributes:
        models: Checkpoints.
        methods: Quantizers.
        bits: Bits per weight; None for each method's default.
        group_sizes: Columns that share a scale; -1 for a whole row.
        components: Parts of the model.
        calibration: Sources of calibration inputs.
        seeds: Seeds of calibration and sampling.
        tasks: Tasks of lmms-eval; one process answers each of these lists.
        limit: Documents per task; None for all.
        images: Images per task, the same random ones for all; None for all.
        batch_size: Batch size as in lmms-eval.
        model_args: Further model arguments of every cell.
        resources: Resources of every cell.
    """

    models: Axis[Model] = ()
    methods: Axis[Method] = ()
    bits: Axis[Bits | None] = (At(None, ""),)
    group_sizes: Axis[GroupSize] = (At(128, ""),)
    components: Annotated[tuple[At[Components], ...], _ITEMS._replace(kind=_Choices)] = (
        At(Components.named("language"), ""),
    )
    calibration: Axis[Calibration] = (At(Calibration(name="self", source="self"), ""),)
    seeds: Axis[Seed] = (At(0, ""),)
    tasks: Annotated[tuple[At[tuple[str, ...]], ...], Placed(_processes, _TaskLists)] = ()
    limit: Count | None = None
    images: _Images | None = None
    batch_size: Annotated[
        Annotated[Whole, Field(ge=1)] | Literal["auto"], Expected("a whole number from 1, or 'auto'")
    ] = 1
    model_args: Arguments = Field(default_factory=dict)
    resources: Resources = Resources()

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the values that the file gives for these fields."""
        return {name: getattr(self, name) for name in names if name in self.model_fields_set}


class Grid(Crossed):
    """A product of axes minus exclusions.

    Attributes:
        exclude: Cells to leave out.
    """

    exclude: Annotated[_Several[Exclusion], _ITEMS] = ()

    @classmethod
    def complete(cls, given: Mapping[str, Any], where: str) -> Grid:
        """Return a grid with a value on every axis.

        Args:
            given: Entries of this grid and of all grids.
            where: Place of the grid in the file.

        Raises:
            ValueError: An axis without a default is not given.
        """
        for needed in ("models", "methods", "tasks"):
            if needed not in given:
                got = ", ".join(name for name in cls.model_fields if given.get(name)) or "nothing"
                raise ValueError(f"{where}: expected {needed!r} for this grid, got {got} alone")
        defaults = {name: cls.model_fields[name].default for name in _AXES - given.keys()}
        here = {name: tuple(at._replace(where=where) for at in default) for name, default in defaults.items()}
        return cls.model_construct(None, **given, **here)


_SINGULAR = {"models": "model", "methods": "method", "group_sizes": "group_size", "seeds": "seed"}
_AXES = {*_SINGULAR, "bits", "components", "calibration"}


class OneCell(Crossed, alias_generator=AliasGenerator(validation_alias=lambda name: _SINGULAR.get(name, name))):
    """A single cell: one value on each axis, whose names are singular."""

    @field_validator(*_AXES, mode="before")
    @classmethod
    def _one(cls, entry: Entry) -> Entry:
        if entry.is_list:
            raise PydanticCustomError("expected", "{words}", {"words": "one value in a cell"})
        return entry


class StudyFile(Grid):
    """A whole study file; its top-level entries apply to each of its grids and cells.

    Attributes:
        name: Name of the study.
        grids: Grids, each of which may override the top level.
        cells: Cells, likewise; of the top-level axes, a cell inherits only models, group sizes and tasks.
        analysis: Analysis to make.
    """

    name: Text = left_out()
    grids: Annotated[_Several[Grid], _ITEMS] = ()
    cells: Annotated[_Several[OneCell], _ITEMS] = ()
    analysis: Annotated[Any, Placed(lambda entry, _: entry)] = None


@dataclass(frozen=True)
class Study:
    """A study as its file states it.

    Attributes:
        name: Name of the study.
        file: Path of the study file.
        grids: Grids to run.
        asked: Entry of the analysis; None for no analysis.
    """

    name: str
    file: str
    grids: tuple[At[Grid], ...]
    asked: Entry | None = None

    @property
    def analysis(self) -> Mapping[str, Any] | None:
        """The analysis to make, as the file states it."""
        return None if self.asked is None else self.asked.plain()
