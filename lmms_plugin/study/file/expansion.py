"""Expansion of grids to cells: axes that do not apply to a method collapse, and no cell is planned twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from lmms_plugin.arguments import DEMO, ModelArguments, without_idle_cache
from lmms_plugin.quant_backends import SERVED, backend_class, get, option_types
from lmms_plugin.quant_backends.backend import CheckpointBackend, DataFreeBackend
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.methods.none import NoneBackend
from lmms_plugin.quant_backends.plans.plan import COMPONENTS, UNTOUCHED_BITS
from lmms_plugin.study.file import served_arms
from lmms_plugin.study.file.grid import Cell, CellAxes, Resources
from lmms_plugin.study.file.schema import PATHS, At, Calibration, Components, Grid, Method, Study
from lmms_plugin.utils.image_slices import ImageSlice
from lmms_plugin.utils.reading.problems import Problems, lines_of, refusal

_LONGEST = 1024
_ORDER = 0
"""Seed of the order of images of which cells with `images` ask about the first ones."""


def cells(study: Study, *, runnable: bool = True) -> tuple[Cell, ...]:
    """Return all cells of a study in the order of its file, each once.

    Args:
        study: Study as its file states it.
        runnable: Whether to refuse what cannot run on this machine.

    Raises:
        ValueError: A method cannot do what a cell asks and the cell is not excluded, a model argument is unknown, two
            cells have the same place in the study, an exclusion matches no cell, or no cell is left; every problem is a
            line that names the place in the file.
    """
    used: set[str] = set()
    found: dict[str, Cell] = {}
    asked: dict[tuple[Any, ...], Cell] = {}
    problems = Problems()
    for grid, where in study.grids:
        for cell in _cells(grid, used, problems if runnable else None):
            with problems.collected():
                _expect_a_place_of_its_own(found.setdefault(cell.place, cell), cell, where)
                _expect_one_name(asked.setdefault(cell.configuration, cell), cell, where)
    for exclusion in (exclusion for grid, _ in study.grids for exclusion in grid.exclude):
        with problems.collected():
            if exclusion.where not in used:
                raise ValueError(f"{exclusion.where}: expected to exclude a cell of the study, got none that fits")
    problems.expect_none()
    if not found:
        raise ValueError(f"{study.file}: expected at least one cell, got none that is not excluded")
    return tuple(found.values())


def of_images(number: int | None) -> str | None:
    """Return a cell's part of the images, given how many it is asked about; None for all."""
    return None if number is None else str(ImageSlice(_ORDER, 0, number))


def _expect_one_name(there: Cell, cell: Cell, where: str) -> None:
    # Analyses compare with the unquantized model, of which there has to be one.
    if there.axes.method != cell.axes.method and cell.backend == NoneBackend.name:
        raise ValueError(
            f"{where}: expected every configuration of the unquantized model once, got {there.axes.method!r} again"
            f" under the name {cell.axes.method!r}: both are {cell.model} with {cell.model_args}"
        )


def _expect_a_place_of_its_own(there: Cell, cell: Cell, where: str) -> None:
    if there.question != cell.question:
        raise ValueError(
            f"{where}: expected cells that differ in axes, tasks or limit, got two of {cell.slug} with different"
            " arguments, batch size or resources: give a model, method or calibration a name of its own"
        )


def _cells(grid: Grid, used: set[str], problems: Problems | None) -> Iterator[Cell]:
    """Yield the cells of a grid; what cannot run on this machine is collected unless `problems` is None."""
    for model, method in product(grid.models, grid.methods):
        for axes, choice, where in _choices(grid, model.value.name, method):
            tasks = [_left(grid, axes, one.value, used) for one in grid.tasks]
            named = {**model.value.arguments, **grid.model_args, **method.value.arguments, **choice}
            given = {name: _located(name, value) for name, value in without_idle_cache(named).items()}
            if problems is not None and any(tasks):
                with problems.collected():
                    given = _checked(method, given, grid.resources, where)
            for some in filter(None, tasks):
                sizes = grid.limit, grid.batch_size, grid.resources
                yield Cell(axes, method.value.backend, given, some, *sizes, images=of_images(grid.images))


def _located(name: str, value: Any) -> Any:
    """Return a model argument with absolute local paths, since cells run in folders of their own."""
    if name == "calibration":
        spec = CalibrationSpec.parse(value)
        local = None if spec.path is None else Path(spec.path).expanduser()
        found = local is not None and local.exists()
        return value.replace(str(spec.path), str(local.absolute()), 1) if local is not None and found else value
    if name in PATHS and value != DEMO and len(str(value)) < _LONGEST and Path(value).expanduser().exists():
        return str(Path(value).expanduser().absolute())
    return value


def _left(grid: Grid, axes: CellAxes, tasks: tuple[str, ...], used: set[str]) -> tuple[str, ...]:
    """Return the tasks of a cell that are not excluded."""
    for exclusion in grid.exclude:
        gone = [task for task in tasks if not exclusion.value.task or task in exclusion.value.task]
        if gone and exclusion.value.matches(axes):
            used.add(exclusion.where)
            tasks = tuple(task for task in tasks if task not in gone)
    return tasks


def _choices(grid: Grid, model: str, method: At[Method]) -> Iterator[tuple[CellAxes, Mapping[str, Any], str]]:
    """Yield the values of the other axes that matter to a method: axes, model arguments, place in the file."""
    name = method.value.name
    samples = bool(grid.model_args.get("samples"))
    seeds: list[int | None] = [seed.value for seed in grid.seeds] if samples else [None]
    seeded = [(seed, {} if seed is None else {"seed": seed}) for seed in seeds]
    if method.value.backend == SERVED:
        for seed, chosen in seeded:
            yield CellAxes(model, name, method.value.options.get("bits"), None, None, None, seed), chosen, method.where
        return
    kind = backend_class(method.value.backend)
    if issubclass(kind, NoneBackend | CheckpointBackend):
        bits = UNTOUCHED_BITS if issubclass(kind, NoneBackend) else None
        for seed, chosen in seeded:
            yield CellAxes(model, name, bits, None, None, None, seed), chosen, method.where
        return
    if issubclass(kind, DataFreeBackend):
        sources: Iterable[tuple[str | None, int | None, Mapping[str, Any]]] = [(None, *one) for one in seeded]
    else:
        sources = [
            (source.value.name, seed.value, {**_calibration(source.value), "seed": seed.value})
            for source, seed in product(grid.calibration, grid.seeds)
        ]
    default_bits, settled = _decided(method)
    grouped: list[tuple[int | None, Mapping[str, Any]]] = [(None, {})]
    if "group_size" not in settled:
        grouped = [(one.value, {"group_size": one.value}) for one in grid.group_sizes]
    for (bits, components, stored, where), (group_size, groups), (source, seed, chosen) in product(
        _stored(grid, default_bits, bool(settled)), grouped, sources
    ):
        axes = CellAxes(model, name, bits, group_size, components, source, seed)
        yield axes, {**stored, **groups, **chosen}, where


def _decided(method: At[Method]) -> tuple[int, Mapping[str, str]]:
    """Return a method's bits where none are given, and the arguments about weights that its format decides."""
    backend, form = method.value.backend, method.value.options.get("format")
    options = {} if form is None or "format" not in option_types(backend) else {"format": form}
    try:
        quantizer = get(backend, **options)
    except ValueError as error:
        raise ValueError(f"{method.where}: {error} (method {method.value.name})") from error
    return quantizer.default_bits, quantizer.settled


def _calibration(source: Calibration) -> dict[str, Any]:
    samples = {} if source.samples is None else {"calibration_samples": source.samples}
    return {"calibration": source.source, **samples}


def _stored(grid: Grid, default_bits: int, decided: bool) -> Iterator[tuple[int | None, str, Mapping[str, Any], str]]:
    """Yield bits and components; the axis of bits applies neither to a component with bits of its own nor to a format.

    Args:
        grid: Grid of a study.
        default_bits: Bits of the method where none are given.
        decided: Whether a format decides the bits.
    """
    for components in grid.components:
        if components.value.bits:
            given = {f"{part}_bits": bits for part, bits in components.value.bits.items()}
            yield None, components.value.name, given, components.where
            continue
        if decided:
            yield default_bits, components.value.name, _with_bits(components.value, default_bits), components.where
            continue
        for bits in grid.bits:
            number = default_bits if bits.value is None else bits.value
            yield number, components.value.name, _with_bits(components.value, number), bits.where


def _with_bits(components: Components, bits: int) -> dict[str, int]:
    others = {f"{part}_bits": bits for part in COMPONENTS if part in components.chosen and part != "language"}
    untouched = {} if "language" in components.chosen else {"language_bits": UNTOUCHED_BITS}
    return {"bits": bits, **others, **untouched}


def _checked(method: At[Method], given: dict[str, Any], resources: Resources, where: str) -> dict[str, Any]:
    """Return the model arguments of a cell that can run."""
    backend = method.value.backend
    try:
        if backend == SERVED:
            return served_arms.checked(given, resources)
        arguments = ModelArguments.parse(given, option_types(backend))
        quantizer = get(backend, **arguments.options)
        if not isinstance(quantizer, NoneBackend | CheckpointBackend):
            quantizer.check(arguments.quant_plan(quantizer.default_bits))
        arguments.calibration_spec()
        arguments.find_checkpoint()
        return given
    except (ValueError, FileNotFoundError) as error:
        told = f"(method {method.value.name}; exclude what cannot be done)"
        raise refusal(f"{where}: {line} {told}" for line in lines_of(error)) from error
