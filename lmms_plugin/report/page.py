"""The report page: one self-contained HTML file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, model_validator

from lmms_plugin import __version__
from lmms_plugin.analysis.study_files import VERDICT, VERDICT_IN_WORDS
from lmms_plugin.report.figures import inlined
from lmms_plugin.report.figures.palette import SURFACES, TONES
from lmms_plugin.report.gallery import Gallery
from lmms_plugin.report.numbers import contents, lost_numbers
from lmms_plugin.report.numbers.guarantee_numbers import ReportedGuarantee
from lmms_plugin.report.numbers.summary import Summary
from lmms_plugin.report.numbers.tables import Column, ReportTable, TableCell
from lmms_plugin.utils.messages import command_line, counted
from lmms_plugin.utils.reading import accounts

ROWS_AT_FIRST = 20
_STYLE, _SCRIPT = "style.css", "script.js"


@dataclass(frozen=True)
class Verdict:
    """Verdict of a study's analysis, in words.

    Attributes:
        sentences: Sentences in order.
        findings: Findings that the verdict rests on.
        tables: Tables that support the verdict.
        notes: Explanation of the tables.
        text: Text of a `verdict.md` where there is no `verdict.json`.
    """

    sentences: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    notes: tuple[str, ...] = ()
    text: str = ""


class _ToldTable(BaseModel):
    """Schema of a table in `verdict.json`."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    title: str
    columns: list[str]
    rows: list[list[Any]]

    @model_validator(mode="after")
    def _rows_are_as_long_as_the_columns(self) -> "_ToldTable":
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"expected {counted(len(self.columns), 'value')} in every row, got {len(row)}")
        return self


class _Told(BaseModel):
    """Schema of `verdict.json`."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    sentences: list[str]
    findings: list[str] | None = None
    tables: list[_ToldTable] | None = None
    notes: list[str] | None = None


def render(
    summary: Summary,
    title: str,
    verdict: Verdict | None,
    gallery: Gallery,
    source: str,
    workers: int = 1,
    guarantee: ReportedGuarantee | None = None,
) -> str:
    """Render the page as HTML.

    Args:
        summary: Summary of the results.
        title: Heading of the page.
        verdict: Verdict for the top of the page; None for none.
        gallery: Pictures with boxes.
        source: Folder as the user named it.
        workers: Maximum number of processes.
        guarantee: Guarantee and where it is kept; None for none.
    """
    tables = contents.every(summary)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            source=source,
            version=__version__,
            lmms_eval=metadata.version("lmms-eval"),
            style=Markup(_read(_STYLE)),
            script=Markup(_read(_SCRIPT)),
            tones={**SURFACES, **TONES},
            verdict=verdict,
            told=list(lost_numbers.sentences(summary)),
            summary=summary,
            counted=counted,
            warnings=list(warnings(summary)),
            facts=facts(summary),
            figures=inlined.shown(summary, workers),
            tables={table.name: table for table in tables},
            meanings=contents.meanings(tables),
            first_rows=ROWS_AT_FIRST,
            gallery=gallery,
            guarantee=guarantee,
            common=", ".join(summary.common),
            leading=_leading(summary),
            commands=list(commands(summary)),
            versions=versions(summary),
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("lmms_plugin.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _leading(summary: Summary) -> str:
    """Return the task that the leader table shows at first."""
    return next((f"{scope.title}: {scope.conditions[0]}" for scope in summary.scopes), "")


def facts(summary: Summary) -> dict[str, str]:
    """Return counts of what was read."""
    answers = sum(run.answers for run in summary.runs)
    tasks = {task for run in summary.runs for task in run.tasks}
    configs = {run.axes.config for run in summary.runs}
    dates = sorted(run.date[:10] for run in summary.runs if run.date)
    when = dict.fromkeys((dates[0], dates[-1])) if dates else {}
    zone = "in lmms-eval's time zone"
    counts = {"run": len(summary.runs), "configuration": len(configs), "task": len(tasks), "answer": answers}
    return {
        **{noun if count == 1 else f"{noun}s": f"{count:,}" for noun, count in counts.items()},
        **({f"{'date' if len(when) == 1 else 'dates'} {zone}": " to ".join(when)} if when else {}),
    }


def warnings(summary: Summary) -> Iterator[str]:
    """Yield caveats that a reader must know."""
    runs = summary.runs
    if limited := [run for run in runs if run.limit is not None]:
        yield (
            f"{len(limited)} of {counted(len(runs), 'run')} stopped early with --limit (e.g."
            f" {limited[0].axes.config.label}, limit {limited[0].limit:g}): their numbers are of the first"
            " documents only and stand for nothing else."
        )
    if failed := summary.folder.failed:
        named = "; ".join(f"{one.cell}: {one.tail or 'no log'}" for one in failed[:5])
        yield f"Of the study's cells {len(failed)} failed and are missing here. {named}"
    models = {run.axes.config.model for run in runs}
    lacking = sorted(models - {run.axes.config.model for run in runs if run.axes.config.dense})
    if lacking:
        yield f"No unquantized run (quant_none) of {', '.join(lacking)}: flips and differences from it cannot be told."
    alone = (line.config for line in summary.lines if line.base is None and not line.config.dense)
    if found := dict.fromkeys(config for config in alone if config.model not in lacking):
        first = next(iter(found))
        yield (
            f"No unquantized run was asked all the questions of {counted(len(found), 'configuration')} (e.g."
            f" {', '.join((first.label, *first.parts))}): their flips and differences cannot be told there."
        )
    unsure = {task.task for run in runs for task in run.measured.tasks.values() if task.unsure == task.records}
    if unsure:
        yield f"No confidence in {counted(len(unsure), 'task')}, e.g. {min(unsure)}: calibration is not known there."
    if others := sorted({task for run in runs for task in run.others}):
        named = ", ".join(others[:5]) + " …" * (len(others) > 5)
        yield f"{counted(len(others), 'task')} not on this page (see lmms-plugin metrics): {named}"
    if summary.superseded:
        yield f"{counted(summary.superseded, 'older run')} of the same configuration and seed left out."
    for condition, tasks in summary.partial.items():
        yield f"Runs differ in their tasks: {condition} is the mean over {', '.join(tasks)} alone."
    yield from summary.folder.left_out


def commands(summary: Summary) -> Iterator[str]:
    """Yield the exact command of each run: as the study logged it, else reconstructed from lmms-eval's log."""
    for run in summary.runs:
        if run.axes.command:
            yield command_line(run.axes.command)
            continue
        parts = ["lmms-eval", "--model", run.model, "--model_args", run.model_args, "--tasks"]
        parts += [",".join((*run.tasks, *run.others)), "--log_samples"]
        parts += ["--batch_size", run.batch_size] if run.batch_size else []
        parts += ["--limit", f"{run.limit:g}"] if run.limit is not None else []
        yield command_line(parts)


def versions(summary: Summary) -> dict[str, str]:
    """Return package → versions that occur in the runs."""
    found: dict[str, set[str]] = {}
    for run in summary.runs:
        for package, version in run.axes.versions.items():
            if version:
                found.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(these)) for package, these in sorted(found.items())}


def read_verdict(path: Path) -> Verdict | None:
    """Read the verdict of a study's folder; None where there is none.

    Raises:
        ValueError: `verdict.json` is invalid.
    """
    folder = path if path.is_dir() else path.parent
    file, words = folder / VERDICT, folder / VERDICT_IN_WORDS
    if not file.is_file():
        return Verdict(text=words.read_text(encoding="utf-8")) if words.is_file() else None
    told = _Told.model_validate(accounts.read(file, _Told))
    tables = tuple(_table(f"verdict-{k}", one) for k, one in enumerate(told.tables or (), start=1))
    return Verdict(tuple(told.sentences), tuple(told.findings or ()), tables, tuple(told.notes or ()))


_NUMBERS = re.compile(r"[-+\u2212]?\d[\d.,]*( ?%)?|")


def _table(name: str, told: _ToldTable) -> ReportTable:
    rows = tuple(tuple(_cell(value) for value in row) for row in told.rows)
    columns = tuple(
        Column(head, numeric=all(_NUMBERS.fullmatch(row[k].text) for row in rows))
        for k, head in enumerate(told.columns)
    )
    return ReportTable(name, told.title, columns, rows)


def _cell(value: object) -> TableCell:
    """Return a cell that sorts a number as such, even if it is written as text."""
    written = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    if not written or not _NUMBERS.fullmatch(written):
        return TableCell(written, written or None)
    plain = written.replace("\u2212", "-").replace(",", "").rstrip(" %")
    return TableCell(written.replace("-", "\u2212"), float(plain))


def _read(name: str) -> str:
    return files("lmms_plugin.report").joinpath("templates", name).read_text(encoding="utf-8")
