"""The command `lmms-plugin reproduce`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmms_plugin.cli.terminal import Working
from lmms_plugin.utils.outputs import expect_free

if TYPE_CHECKING:
    from lmms_plugin.analysis.reproduction.judging_reproduction import ModelReproduction
    from lmms_plugin.analysis.reproduction.published import PublishedGrounding

_OUTPUT = Path("reproduce_output")
_FIRST_TASK = "refcocoplus_rec_testA"
_NOT_REPRODUCED = 1


def reproduce(
    model: Annotated[str | None, typer.Argument(help="Id on the hub or folder of a checkpoint.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task with a published number; may be given again. RefCOCO+ testA by default."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Expressions per task: 300 give a first look.")] = None,
    results: Annotated[Path | None, typer.Option(help="Judge this finished run of quant_none; runs nothing.")] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Published model that the checkpoint is.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(help="YAML file with published numbers of your own, which go first.")
    ] = None,
    model_args: Annotated[
        str | None, typer.Option(help="Further model arguments: max_pixels=1003520,dtype=bfloat16.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="As in lmms-eval.")] = None,
    output: Annotated[Path | None, typer.Option(help=f"New folder that keeps the run; {_OUTPUT} by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the images for every interval.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
) -> None:
    """Say whether the unquantized model reaches what was published.

    It is run, or a run is given. Exit status: 0 yes, 1 not shown.
    """
    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.analysis.measure import MeasurementSettings
    from lmms_plugin.analysis.reproduction.judging_reproduction import judge
    from lmms_plugin.analysis.reproduction.published import PublishedGrounding

    settings = MeasurementSettings(None, resamples, seed, level, workers=os.cpu_count() or 1)
    record = PublishedGrounding.known(published)
    of_a_run = {"--limit": limit, "--model-args": model_args, "--batch-size": batch_size, "--output": output}
    if results is None:
        model, tasks = _asked(model, name, task or [], record)
        place = expect_free(output or _OUTPUT, "--output")
        _run(model, tasks, place, limit, model_args, batch_size)
    else:
        for given, value in {"MODEL": model, **of_a_run}.items():
            if value is not None:
                raise ValueError(f"{given} says nothing with --results, whose run is finished; leave it out")
        place, tasks = results, task or []
    found = judge(read_one(place), record, settings, name=name, tasks=tasks)
    _print(found, json=json)
    raise typer.Exit(0 if found.reproduced else _NOT_REPRODUCED)


def _asked(
    model: str | None, name: str | None, tasks: Sequence[str], record: PublishedGrounding
) -> tuple[str, list[str]]:
    """Return checkpoint and tasks, of which there are published numbers, before anything is loaded."""
    from lmms_plugin.analysis.reproduction.judging_reproduction import expect_tasks

    if model is None:
        raise ValueError("expected MODEL, an id on the hub or the folder of a checkpoint, or --results, got neither")
    found, _ = record.identify(model, name)
    default = _FIRST_TASK if _FIRST_TASK in found.scores else next(iter(found.scores))
    return model, expect_tasks(found, tasks or [default])


def _run(
    model: str, tasks: Sequence[str], folder: Path, limit: int | None, model_args: str | None, batch_size: str | None
) -> None:
    from lmms_plugin import side_by_side
    from lmms_plugin.utils.messages import command_line

    arguments = ",".join(filter(None, (f"pretrained={model}", model_args)))
    spec = side_by_side.ModelSpec.parse(f"quant_none:{arguments}")
    spec.expect_unquantized()
    spec.expect_possible()
    command = side_by_side.command_of(spec, ",".join(tasks), folder, limit, batch_size)
    typer.echo(command_line(command), err=True)
    with Working(f"running {spec.model}"):
        side_by_side.run(command, folder)


def _print(found: ModelReproduction, *, json: bool) -> None:
    from lmms_plugin.cli.measuring import print_json
    from lmms_plugin.cli.screens.reproduction_screen import reproduction_screen

    if json:
        print_json({**found._asdict(), "reproduced": found.reproduced})
    else:
        typer.echo(reproduction_screen(found))
