"""The command `lmms-plugin report`."""

from pathlib import Path
from typing import Annotated

import typer

from lmms_plugin.cli.terminal import each
from lmms_plugin.utils.outputs import expect_file, expect_folder


def report(
    results: Annotated[Path, typer.Argument(help="Study, folder with results files of lmms-eval, or one such file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="Folder for figures as PNG and SVG, tables as CSV.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page; by default the folder's name.")] = None,
    estimator: Annotated[str | None, typer.Option(help="Confidence estimator; by default that of the task.")] = None,
    resamples: Annotated[
        int | None, typer.Option(min=1, help="Resamples of the images for every interval; by default 500.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples and of the held-out images.")] = 0,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
    pictures: Annotated[int, typer.Option(min=0, help="Expressions in the gallery; 0 for none.")] = 12,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one per processor.")] = None,
) -> None:
    """Write one HTML page on a folder of results.

    Tables, figures, flips, pictures and commands; it needs no other file.
    """
    from lmms_plugin.analysis.measure import MeasurementSettings
    from lmms_plugin.report import building

    expect_file("--output", output)
    if figures is not None:
        expect_folder("--figures", figures)
    draws = resamples or building.RESAMPLES
    settings = MeasurementSettings(estimator, draws, seed, level, workers=workers or building.default_workers())
    lines = building.build(results, output, settings, title=title, figures=figures, pictures=pictures)
    for line in each(lines, "building the page"):
        typer.echo(line)
