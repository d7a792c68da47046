"""The commands `lmms-plugin metrics`, `compare` and `estimators`."""

from __future__ import annotations

import os
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmms_plugin.cli.terminal import Working, console

if TYPE_CHECKING:
    from rich.console import RenderableType

Estimator = Annotated[str | None, typer.Option(help="Confidence estimator; by default the one of the task.")]
Resamples = Annotated[int, typer.Option(min=1, help="Resamples of the images for every interval.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the resamples and of the held-out images.")]
Level = Annotated[float, typer.Option(help="Confidence level of the intervals.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Everything = Annotated[bool, typer.Option("--all", help="Print every row, however many there are.")]
_HELD_OUT, _CALIBRATOR = 0.2, "platt"


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (metrics, compare, estimators):
        app.command()(command)


def metrics(
    results: Annotated[Path, typer.Argument(help="Results file of lmms-eval, or a folder with such files.")],
    everything: Everything = False,
    json: AsJson = False,
    estimator: Estimator = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    level: Level = 0.95,
    held_out: Annotated[
        float, typer.Option(help="Share of the images to choose thresholds and fit calibrators on.")
    ] = _HELD_OUT,
    calibrator: Annotated[str, typer.Option(help="temperature, platt, isotonic or beta.")] = _CALIBRATOR,
    chosen_on: Annotated[
        Path | None,
        typer.Option(
            help="Run whose held-out images thresholds and calibrator come from, e.g. of the unquantized model."
        ),
    ] = None,
) -> None:
    """Recompute every metric of runs, with intervals over images.

    The logs of samples say all; no model is loaded.
    """
    from lmms_plugin.analysis import measure, overview
    from lmms_plugin.analysis.logs import find, read, read_one
    from lmms_plugin.cli.screens.metrics_screen import metrics_screen

    workers = os.cpu_count() or 1
    settings = measure.MeasurementSettings(estimator, resamples, seed, level, held_out, calibrator, workers)
    chosen = None if chosen_on is None else read_one(chosen_on)
    runs = [read(file) for file in find(results)]
    for line in (line for run in runs for line in measure.without_grid(run)):
        typer.echo(line, err=True)
    if everything or json:
        with Working("resampling"):
            found = [(run, measure.measure(run, settings, chosen), measure.robust(run, settings)) for run in runs]
        _print_all_metrics(found, level, json=json)
        return
    with Working("resampling"):
        first = [(run, overview.overview(run, settings)) for run in runs]
    given = held_out != _HELD_OUT or calibrator != _CALIBRATOR or chosen_on is not None
    notes = ["What is chosen or fitted on held-out images is printed by --all and --json."] if given else []
    typer.echo(metrics_screen(first, level, notes))


def _print_all_metrics(found: list[tuple[Any, Any, Any]], level: float, *, json: bool) -> None:
    from lmms_plugin.cli import printed

    if json:
        names = ("run", "file", "limit", "metrics", "robustness")
        rows = [(run.label, str(run.file), run.limit, numbers, robust) for run, numbers, robust in found]
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    for run, numbers, robust in found:
        print_tables(
            printed.metrics_table(numbers, run.label, level),
            *(printed.robustness_table(rows, split) for split, rows in robust.items()),
        )


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Results file or folder of the run to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run in question, on the same documents.")],
    everything: Everything = False,
    json: AsJson = False,
    margin: Annotated[
        float | None,
        typer.Option(help="Largest difference that counts as none, such as 0.02: adds a test of equivalence."),
    ] = None,
    estimator: Estimator = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    level: Level = 0.95,
) -> None:
    """Compare two runs on the same documents.

    Paired intervals, flips, corrected p-values, equivalence, and what a shift costs each.
    """
    from lmms_plugin.analysis import comparison, measure
    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.cli import printed
    from lmms_plugin.cli.screens.comparison_screen import comparison_screen

    settings = measure.MeasurementSettings(estimator, resamples, seed, level, workers=os.cpu_count() or 1)
    comparison.expect_margin(margin)
    runs = read_one(first), read_one(second)
    for line in measure.without_grid(runs[0]):
        typer.echo(line, err=True)
    with Working("resampling"):
        found = comparison.compare(*runs, settings, margin)
    if json:
        print_json({"first": runs[0].label, "second": runs[1].label, **found._asdict()})
        return
    if not everything:
        typer.echo(comparison_screen(found, [run.title for run in runs], settings, margin))
        return
    typer.echo(f"first:  {runs[0].label}\nsecond: {runs[1].label}")
    tables = [printed.changes_table(found, settings, margin)]
    tables += [printed.flips_table(found.flips)] if found.flips else []
    tables += [printed.shifted_table(found)] if found.shifted else []
    print_tables(*tables)


def estimators(
    results: Annotated[Path, typer.Argument(help="Results file of lmms-eval, or a folder with such files.")],
    everything: Everything = False,
    json: AsJson = False,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    level: Level = 0.95,
) -> None:
    """Compare the confidence estimators of a run.

    By AUROC, AURC and ECE.
    """
    from lmms_plugin.analysis import estimator_ranking
    from lmms_plugin.analysis.logs import find, read
    from lmms_plugin.analysis.measure import MeasurementSettings
    from lmms_plugin.cli import printed
    from lmms_plugin.cli.screens.metrics_screen import estimators_screen

    settings = MeasurementSettings(None, resamples, seed, level, workers=os.cpu_count() or 1)
    with Working("reading and resampling"):
        found = [(run, estimator_ranking.judge(run, settings)) for run in map(read, find(results))]
    if json:
        print_json([{"run": run.label, "file": str(run.file), "estimators": judged} for run, judged in found])
        return
    if not everything:
        typer.echo(estimators_screen(found, level))
        return
    print_tables(*(printed.estimators_table(judged, run.label, level) for run, judged in found))


def print_json(value: object) -> None:
    """Print a value as JSON."""
    from lmms_plugin.utils.plain_json import plain

    typer.echo(dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def print_tables(*tables: RenderableType) -> None:
    """Print tables, and where their numbers are explained."""
    # On a terminal that is narrower than a table, plain lines wrap; rich would cut them.
    terminal = console(*tables)
    for table in tables:
        terminal.print(table)
    terminal.print("What each number means: docs/metrics.md", style="dim")
