"""A study file as values: every name and number checked where it stands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.quant_backends import names, option_types
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.plans.plan import COMPONENTS, UNTOUCHED_BITS, QuantSpec
from lmms_plugin.study.file.asked import located
from lmms_plugin.study.file.expansion import PATHS
from lmms_plugin.study.file.grid import At, Calibration, Components, Exclusion, Grid, Method, Model, Resources, Study
from lmms_plugin.study.verdicts import conclusions
from lmms_plugin.utils.located import Entry, load
from lmms_plugin.utils.suggest import near

T = TypeVar("T")

ALL = ("vision", "connector", "language")
"""What `components: all` quantizes: everything before the output projection, which is named by itself (`head`)."""

_SINGULAR = {
    "models": "model",
    "methods": "method",
    "bits": "bits",
    "group_sizes": "group_size",
    "components": "components",
    "calibration": "calibration",
    "seeds": "seed",
    "tasks": "tasks",
}
_SETTINGS = ("limit", "batch_size", "model_args", "resources")
_OF_GRID = (*_SINGULAR, *_SETTINGS, "exclude")
_OF_CELL = (*_SINGULAR.values(), *_SETTINGS)
_OF_STUDY = ("name", *_OF_GRID, "grids", "cells", "analysis")
_TAKEN = (
    *("bits", *(f"{part}_bits" for part in COMPONENTS), "group_size"),
    *("calibration", "calibration_samples", "seed", "batch_size", "report"),
)
_AXES = ("model", "method", "bits", "group_size", "components", "calibration", "seed")


def read(file: Path) -> Study:
    """Read a study file.

    What stands at its top holds for every one of its `grids` and `cells`, each of which may say otherwise; without
    them it is the only grid.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If something in it is not as it has to be; says where, what was expected and what came.
    """
    top = load(file)
    given = top.fields(_OF_STUDY)
    shared = {name: entry for name, entry in given.items() if name in _OF_GRID}
    exclude = _list(shared.pop("exclude", None), _exclusion)
    grids = [_grid(entry, shared, exclude) for entry in _entries(given.get("grids"))]
    grids += [_cell(entry, shared) for entry in _entries(given.get("cells"))]
    if not grids:
        grids = [_of_fields(top, shared, exclude)]
    name = given["name"].text() if "name" in given else file.stem
    return Study(name, str(file), tuple(grids), *_analysis(given.get("analysis")))


def _analysis(entry: Entry | None) -> tuple[Mapping[str, Any] | None, Mapping[str, str]]:
    """What the file asks for, and where each entry of it stands."""
    if entry is None:
        return None, {}
    places = {"": entry.where, **{name: one.where for name, one in entry.fields(None).items()}}
    try:
        conclusions.check(entry.plain())
    except ValueError as error:
        raise located(error, places) from error
    return entry.plain(), places


def _entries(entry: Entry | None) -> list[Entry]:
    return [] if entry is None else entry.items()


def _list(entry: Entry | None, read_one: Callable[[Entry], T]) -> tuple[T, ...]:
    return tuple(map(read_one, _entries(entry)))


def _grid(entry: Entry, shared: Mapping[str, Entry], exclude: tuple[Exclusion, ...]) -> Grid:
    own = entry.fields(_OF_GRID)
    excluded = exclude + _list(own.get("exclude"), _exclusion)
    return _of_fields(entry, {**shared, **own}, excluded)


def _cell(entry: Entry, shared: Mapping[str, Entry]) -> Grid:
    """A grid with one value per axis."""
    own = entry.fields(_OF_CELL)
    plural = {one: many for many, one in _SINGULAR.items()}
    for name, value in own.items():
        if name in plural and name != "tasks" and value.is_list:
            raise value.wrong("one value in a cell", "a list")
    # Of the shared axes, a cell has its own alone: others would make several of it.
    given = {name: value for name, value in shared.items() if name in (*_SETTINGS, "models", "tasks", "group_sizes")}
    return _of_fields(entry, given | {plural.get(name, name): value for name, value in own.items()}, ())


def _of_fields(entry: Entry, given: Mapping[str, Entry], exclude: tuple[Exclusion, ...]) -> Grid:
    for needed in ("models", "methods", "tasks"):
        if needed not in given:
            raise entry.wrong(f"{needed!r} for this grid", f"{', '.join(given) or 'nothing'} alone")

    def axis(name: str, read_one: Callable[[Entry], T], default: T) -> tuple[At[T], ...]:
        return expanded(name, lambda one: [read_one(one)], default)

    def expanded(name: str, read_some: Callable[[Entry], list[T]], default: T) -> tuple[At[T], ...]:
        if name not in given:
            return (At(default, entry.where),)
        found = [At(value, one.where) for one in given[name].items() for value in read_some(one)]
        for position, one in enumerate(found):
            if any(one.value == other.value for other in found[:position]):
                raise ValueError(f"{one.where}: expected every value of {name} once, got this one twice")
            if any(_named_alike(one.value, other.value) for other in found[:position]):
                problem = f"expected {name} with a name each, got two called {_name_of(one.value)!r}: name one of them"
                raise ValueError(f"{one.where}: {problem} ({{name: ..., ...}})")
        return tuple(found)

    return Grid(
        models=axis("models", _model, Model("", {})),
        methods=axis("methods", _method, Method("", "")),
        bits=axis("bits", _bits, None),
        group_sizes=axis("group_sizes", _group_size, 128),
        components=expanded("components", _components, Components("language", ("language",))),
        calibration=axis("calibration", _calibration, Calibration("self", "self")),
        seeds=axis("seeds", lambda one: one.whole(0), 0),
        tasks=_tasks(given["tasks"]),
        limit=given["limit"].whole(1) if "limit" in given and given["limit"].scalar() is not None else None,
        batch_size=_batch_size(given["batch_size"]) if "batch_size" in given else 1,
        model_args=_arguments(given["model_args"]) if "model_args" in given else {},
        resources=_resources(given["resources"]) if "resources" in given else Resources(),
        exclude=exclude,
        where=entry.where,
    )


def _name_of(value: Any) -> str | None:
    return getattr(value, "name", None)


def _named_alike(one: Any, other: Any) -> bool:
    return _name_of(one) is not None and _name_of(one) == _name_of(other)


def _model(entry: Entry) -> Model:
    if not entry.is_mapping:
        name = entry.text()
        return Model(name.rstrip("/").rsplit("/", 1)[-1], {"pretrained": _argument(entry)})
    given = entry.fields(None, required=("pretrained",))
    of_model = {name: value for name, value in given.items() if name != "name"}
    arguments = {name: _argument(value) for name, value in _free(of_model).items()}
    fallback = str(arguments["pretrained"]).rstrip("/").rsplit("/", 1)[-1]
    return Model(given["name"].text() if "name" in given else fallback, arguments)


def _method(entry: Entry) -> Method:
    if not entry.is_mapping:
        name = entry.one_of(names(), "a method")
        return Method(name, name)
    given = entry.fields(None, required=("method",))
    backend = given["method"].one_of(names(), "a method")
    of_backend = {name: value for name, value in given.items() if name not in ("method", "name")}
    options = {name: _argument(value) for name, value in _free(of_backend, option_types(backend)).items()}
    fallback = "+".join([backend, *(f"{name}={value}" for name, value in options.items())])
    return Method(given["name"].text() if "name" in given else fallback, backend, options)


def _bits(entry: Entry) -> int | None:
    bits = entry.scalar()
    try:
        return None if bits is None else QuantSpec(bits).bits  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from error


def _group_size(entry: Entry) -> int:
    size = entry.scalar()
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise entry.wrong("a whole number of columns from 1, or -1 for a whole row")
    return size


def _components(entry: Entry) -> list[Components]:
    """One choice of components; where they have lists of bits, one for each combination that quantizes anything."""
    if entry.is_mapping:
        given = {
            name: [_bits(one) or UNTOUCHED_BITS for one in value.items()]
            for name, value in entry.fields(COMPONENTS).items()
        }
        combinations = [dict(zip(given, bits, strict=True)) for bits in product(*given.values())]
        quantized = [bits for bits in combinations if set(bits.values()) != {UNTOUCHED_BITS}]
        if not quantized:
            raise entry.wrong("a component with less than 16 bits", "none: without quantization the method is none")
        return [_with_names(bits) for bits in quantized]
    name = entry.text()
    if name == "all":
        return [Components(name, ALL)]
    chosen = tuple(name.split("+"))
    for part in chosen:
        if part not in COMPONENTS or chosen.count(part) > 1:
            known = (*COMPONENTS, "all")
            expected = f"{', '.join(known)}, several joined by +, or a mapping from component to bits"
            raise entry.wrong(expected, f"{name!r}{near(part, known)}")
    return [Components(name, chosen)]


def _with_names(bits: Mapping[str, int]) -> Components:
    everything: dict[str, int] = {name: bits.get(name, UNTOUCHED_BITS) for name in COMPONENTS}
    return Components("-".join(f"{name}{count}" for name, count in bits.items()), bits=everything)


def _calibration(entry: Entry) -> Calibration:
    if not entry.is_mapping:
        source = entry.text()
        return Calibration(source, _source(entry))
    given = entry.fields(("name", "source", "samples"), required=("source",))
    source = _source(given["source"])
    samples = given["samples"].whole(1) if "samples" in given else None
    return Calibration(given["name"].text() if "name" in given else source, source, samples)


def _source(entry: Entry) -> str:
    source = entry.text()
    if source == "none":
        raise entry.wrong("a source of calibration inputs", "'none': methods without calibration are rtn, hqq and such")
    try:
        CalibrationSpec.parse(source)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{entry.where}: {error}") from error
    return source


def _tasks(entry: Entry) -> tuple[At[tuple[str, ...]], ...]:
    """Tasks of one process; a list of lists is several processes."""
    nested = [one for one in entry.items() if one.is_list]
    if nested and len(nested) < len(entry.items()):
        raise entry.wrong("tasks, or lists of tasks, each for a process of its own", "both")
    lists = nested or [entry]
    return tuple(At(tuple(dict.fromkeys(task.text() for task in one.items())), one.where) for one in lists)


def _batch_size(entry: Entry) -> int | str:
    return "auto" if entry.scalar() == "auto" else entry.whole(1)


def _arguments(entry: Entry) -> dict[str, Any]:
    return {name: _argument(value) for name, value in _free(entry.fields(None)).items()}


def _free(given: dict[str, Entry], options: Collection[str] = ()) -> dict[str, Entry]:
    """Refuse names that are no model argument, or that have a place of their own in the study.

    Args:
        given: Name → value.
        options: Further names, of a method.
    """
    known = [*(field.name for field in fields(ModelArguments) if field.name not in (*_TAKEN, "options")), *options]
    for name, value in given.items():
        if name in _TAKEN:
            raise value.wrong("a model argument that is no axis of the study and no file of its own", repr(name))
        if name not in known:
            raise value.wrong("a model argument or an option of a method", f"{name!r}{near(name, known)}")
        if name in PATHS:
            value.text()
    return given


def _argument(entry: Entry) -> Any:
    """A value of a model argument, which has to survive lmms-eval's parting at commas."""
    value = entry.scalar()
    if value is None or (isinstance(value, str) and set(value) & set(",\"'{}[]")):
        raise entry.wrong("a number, True, False, or a text without commas, quotes and brackets")
    return value


def _resources(entry: Entry) -> Resources:
    given = entry.fields(("gpus", "processes", "cpus", "timeout"))
    gpus = given["gpus"].whole(0) if "gpus" in given and given["gpus"].scalar() != "auto" else None
    processes = given["processes"].whole(1) if "processes" in given else 1
    if gpus and gpus % processes:
        raise given["gpus"].wrong(f"as many GPUs for each of the {processes} processes")
    cpus, timeout = (given[name].whole(1) if name in given else None for name in ("cpus", "timeout"))
    return Resources(gpus, processes, cpus, timeout)


def _exclusion(entry: Entry) -> Exclusion:
    given = entry.fields((*_AXES, "task"))
    tasks = tuple(one.text() for one in _entries(given.pop("task", None)))
    if not given and not tasks:
        raise entry.wrong(f"one of {', '.join((*_AXES, 'task'))}", "nothing")
    axes = {axis: tuple(one.scalar() for one in value.items()) for axis, value in given.items()}
    return Exclusion(axes, tasks, entry.where)
