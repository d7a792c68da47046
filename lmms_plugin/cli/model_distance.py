"""The command `lmms-plugin distance`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lmms_plugin.cli.measuring import AsJson, Everything, Level, Resamples, Seed, print_json
from lmms_plugin.cli.terminal import Working
from lmms_plugin.utils.outputs import expect_free


def distance(
    first: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Results of the unquantized model, or with --tasks the model; alone: a run with reference=.",
        ),
    ],
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="The same of the quantized model, on the same documents.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Run B now on these tasks, with A as its reference: quant_none:pretrained=demo.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Documents per task, with --tasks.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="As in lmms-eval, with --tasks.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder that keeps the run, with --tasks; by default it is not kept.")
    ] = None,
    everything: Everything = False,
    json: AsJson = False,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    level: Level = 0.95,
) -> None:
    """Say how far a quantized model is from the unquantized one.

    No label is used.
    """
    from lmms_plugin.analysis.measure import MeasurementSettings

    settings = MeasurementSettings(None, resamples, seed, level, workers=os.cpu_count() or 1)
    if tasks is not None:
        if second is None:
            raise ValueError("--tasks runs B with A as its reference: expected two models, got one")
        with tempfile.TemporaryDirectory(prefix="lmms-plugin-distance-") as folder:
            place = expect_free(output, "--output") if output is not None else Path(folder)
            _run(first, second, tasks, place, limit, batch_size)
            _print(place, None, settings, everything=everything, json=json)
        return
    given = {"--limit": limit, "--batch-size": batch_size, "--output": output}
    if useless := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{useless[0]} says nothing without --tasks, which runs B now with A as its reference")
    from lmms_plugin import side_by_side

    of_first, of_second = (None if text is None else side_by_side.finished(text) for text in (first, second))
    assert of_first is not None
    _print(of_first, of_second, settings, everything=everything, json=json)


def _run(first: str, second: str, tasks: str, place: Path, limit: float | None, batch_size: str | None) -> None:
    from lmms_plugin import side_by_side
    from lmms_plugin.utils.messages import command_line

    spec = side_by_side.ModelSpec.parse(second).with_reference(side_by_side.ModelSpec.parse(first))
    spec.expect_possible()
    command = side_by_side.command_of(spec, tasks, place, limit, batch_size)
    typer.echo(command_line(command), err=True)
    with Working(f"running {spec.model}"):
        side_by_side.run(command, place)


def _print(first: Path, second: Path | None, settings: object, *, everything: bool, json: bool) -> None:
    from lmms_plugin.analysis import distances
    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.analysis.measure import MeasurementSettings
    from lmms_plugin.cli.screens.distance_screen import distance_lines, distance_screen

    assert isinstance(settings, MeasurementSettings)
    runs = [read_one(path) for path in (first, second) if path is not None]
    with Working("resampling"):
        found = distances.of_run(runs[0], settings) if second is None else distances.of_runs(runs[0], runs[1], settings)
    labels = [run.title for run in runs]
    if json:
        print_json({"runs": [run.label for run in runs], "tasks": found})
    elif everything:
        typer.echo("\n".join(distance_lines(found, labels, settings.level)))
    else:
        typer.echo(distance_screen(found, labels, settings.level))
