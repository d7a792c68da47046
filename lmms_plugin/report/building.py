"""Building of the report page and its files from a folder of results."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib import rc_context

from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.report import gallery, page
from lmms_plugin.report.figures import all_figures as drawing
from lmms_plugin.report.figures import svg
from lmms_plugin.report.numbers import contents, guarantee_numbers
from lmms_plugin.report.numbers.results_folder import RESAMPLES, default_workers, read_folder
from lmms_plugin.report.numbers.summary import Summary, summarise
from lmms_plugin.utils.files import encoded, replace_bytes
from lmms_plugin.utils.messages import counted
from lmms_plugin.utils.processes.freed_memory import give_back_freed_memory

__all__ = ["RESAMPLES", "build", "default_workers"]
_DPI = 200


def build(
    results: Path,
    output: Path,
    settings: MeasurementSettings,
    *,
    title: str | None,
    figures: Path | None,
    pictures: int,
) -> Iterator[str]:
    """Write the page and, on request, figures and tables as files; yield one line on each step.

    Args:
        results: Study, folder of results, or one results file.
        output: Path of the page.
        settings: Estimator, intervals, processes.
        title: Title of the page; None for the folder's name.
        figures: Folder for figures and tables; None for none.
        pictures: Number of expressions in the gallery.

    Raises:
        ValueError: As `lmms_plugin.report.numbers.results_folder.read_folder`.
    """
    verdict, guarantee = page.read_verdict(results), guarantee_numbers.read(results)
    folder = read_folder(results, settings)
    summary = summarise(folder, settings.level)
    for run in folder.runs:
        # All intervals are made: this is most of what a study's runs hold, and drawing needs the memory.
        run.measured.resampled.clear()
    give_back_freed_memory()
    heading = title or results.resolve().name.removesuffix("_results.json")
    shown = gallery.build(summary, pictures)
    html = page.render(summary, heading, verdict, shown, str(results), settings.workers, guarantee)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(html)
    replace_bytes(output, content)
    yield f"{output}: {counted(len(summary.runs), 'run')}, {len(content) / 1e6:.1f} MB"
    if figures is not None:
        yield from _files(summary, figures)


def _files(summary: Summary, folder: Path) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [one for section in drawing.every(summary).values() for one in section]
    for one in drawn:
        replace_bytes(folder / f"{one.name}.svg", encoded(svg.svg(one.figure)))
        with rc_context({"text.parse_math": False}):
            one.figure.savefig(folder / f"{one.name}.png", dpi=_DPI, facecolor="white")
    tables = [*contents.every(summary), *(one.table for one in drawn)]
    for table in tables:
        replace_bytes(folder / f"{table.name}.csv", encoded(table.csv()))
    yield f"{folder}: {counted(len(drawn), 'figure')}, {counted(len(tables), 'table')}"
