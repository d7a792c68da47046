"""The command `lmms-plugin parity`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lmms_plugin.cli.terminal import Working
from lmms_plugin.utils.outputs import expect_free

_DIFFERENT = 1


def parity(
    first: Annotated[str, typer.Argument(metavar="A", help="Results of a run, or with --tasks a model: NAME:ARGS.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same of what is to give the same answers.")],
    tasks: Annotated[
        str | None, typer.Option(help="Run both models now on these tasks: quant_none:pretrained=demo and the like.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Documents per task, with --tasks.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="As in lmms-eval, with --tasks.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder that keeps both runs, with --tasks; by default none is kept.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Difference of log-probabilities in nats that counts as none; 0.001.")
    ] = None,
    estimator: Annotated[str | None, typer.Option(help="Confidence estimator; by default that of the task.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the images for every interval.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
    everything: Annotated[bool, typer.Option("--all", help="Cut nothing, however long it gets.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say whether two engines give the same answers, or why not.

    Exit status: 0 same, 1 different, 2 neither.
    """
    from lmms_plugin import side_by_side
    from lmms_plugin.analysis.measure import MeasurementSettings

    settings = MeasurementSettings(estimator, resamples, seed, level, workers=os.cpu_count() or 1)
    if tasks is None:
        given = {"--limit": limit, "--batch-size": batch_size, "--output": output}
        if useless := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{useless[0]} says nothing without --tasks, which runs both models now")
        paths = side_by_side.finished(first), side_by_side.finished(second)
        status = _compare(*paths, settings, tolerance, everything=everything, json=json)
    else:
        with tempfile.TemporaryDirectory(prefix="lmms-plugin-parity-") as folder:
            place = expect_free(output, "--output") if output is not None else Path(folder)
            folders = _run(first, second, tasks, place, limit, batch_size)
            status = _compare(*folders, settings, tolerance, everything=everything, json=json)
    raise typer.Exit(status)


def _run(
    first: str, second: str, tasks: str, place: Path, limit: float | None, batch_size: str | None
) -> tuple[Path, Path]:
    from lmms_plugin import side_by_side
    from lmms_plugin.utils.messages import command_line

    specs = [side_by_side.ModelSpec.parse(text).with_evidence() for text in (first, second)]
    for spec in specs:
        spec.expect_possible()
    folders = place / "A", place / "B"
    for spec, folder in zip(specs, folders, strict=True):
        command = side_by_side.command_of(spec, tasks, folder, limit, batch_size)
        typer.echo(command_line(command), err=True)
        with Working(f"running {spec.model}"):
            side_by_side.run(command, folder)
    return folders


def _compare(
    first: Path, second: Path, settings: object, tolerance: float | None, *, everything: bool, json: bool
) -> int:
    from json import dumps

    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.analysis.measure import MeasurementSettings
    from lmms_plugin.analysis.parity.judging_parity import TOLERANCE, judge
    from lmms_plugin.cli.printed_parity import lines
    from lmms_plugin.utils.plain_json import plain

    assert isinstance(settings, MeasurementSettings)
    found = judge(read_one(first), read_one(second), settings, TOLERANCE if tolerance is None else tolerance)
    if json:
        typer.echo(dumps(plain(found), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        typer.echo("\n".join(lines(found, settings.level, everything=everything)))
    return 0 if found.same else _DIFFERENT
