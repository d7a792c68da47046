"""The commands `lmms-plugin study plan`, `run` and `analyse`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmms_plugin.cli.terminal import Working, console
from lmms_plugin.utils.outputs import expect_file, expect_folder
from lmms_plugin.utils.reading.located import load

if TYPE_CHECKING:
    from lmms_plugin.study.run.execution import Finished

app = typer.Typer(no_args_is_help=True, help="A grid of models, methods and tasks: plan it, run it.")
StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Study file (docs/studies.md).")]


@app.command("plan")
def plan_study(
    file: StudyFile,
    output: Annotated[Path | None, typer.Option(help="Folder of the study: what is done there, what it took.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every cell.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    power: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Choose images and seeds that find this difference, as 0.02 for 2 points."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Choose images and seeds that take no longer: 90m, 24h, 2d.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the study file with the images and seeds chosen.")
    ] = None,
) -> None:
    """Print a study's cells, their expected cost, and the smallest differences that they will show. Nothing is run."""
    # A file that is none is refused before seconds of imports, here and below.
    load(file)
    chooses = power is not None or budget is not None
    _expect_possible(file, output, write, chooses=chooses)
    from lmms_plugin.cli.screens.plan_screen import plan_screen
    from lmms_plugin.cli.study_display import plan_table
    from lmms_plugin.study.file.reading import read
    from lmms_plugin.study.run import design, planning
    from lmms_plugin.utils.files import replace_text

    most = None if budget is None else design.parsed_budget(budget)
    with Working("planning"):
        study = read(file)
        found = planning.plan(study, output)
        made = None if chooses else design.told(found, output)
        if chooses:
            made = design.chosen(found, difference=power, budget=most, folder=output)
            found = planning.plan(study, output, only=design.cells_of(found, made))
    for line in planning.remarks(found, output):
        typer.echo(line, err=True)
    if write is not None and isinstance(made, design.Design):
        write.parent.mkdir(parents=True, exist_ok=True)
        replace_text(write, design.written(study, made))
    if json:
        said = {} if made is None or isinstance(made, str) else {"design": made.to_dict()}
        typer.echo(dumps(found.to_dict() | said, indent=1, ensure_ascii=False, allow_nan=False))
        return
    if not everything:
        typer.echo(plan_screen(found, made, chosen=chooses))
        return
    console().print(plan_table(found))
    typer.echo(planning.summary(found))


def _expect_possible(file: Path, output: Path | None, write: Path | None, *, chooses: bool) -> None:
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output: expected the folder of a study, got the file {output}")
    if write is None:
        return
    if not chooses:
        raise ValueError("--write: expected --power or --budget, which choose images and seeds")
    expect_file("--write", write)
    if write.exists() and write.samefile(file):
        raise ValueError(f"--write: expected another name than {file}, whose comments would be lost")


@app.command("run")
def run_study(
    file: StudyFile,
    output: Annotated[Path, typer.Option(help="Folder of the study; what is finished there is not run again.")],
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try cells again that failed before.")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster: auto, host:6379.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Copy finished cells there, and take from there: s3://..., a path."),
    ] = None,
    until_decided: Annotated[
        bool,
        typer.Option("--until-decided", help="Ask about ever more images, until every comparison is decided."),
    ] = False,
    first_images: Annotated[
        int | None, typer.Option(min=1, help="Images of the first stage of --until-decided; a quarter, or 30.")
    ] = None,
    boundaries: Annotated[
        str | None,
        typer.Option(
            metavar="planned|any-time",
            help="When --until-decided is: by tests at its stages, or by sequences that hold at any time; planned.",
        ),
    ] = None,
) -> None:
    """Run the missing cells of a study, each as an lmms-eval process of its own."""
    expect_folder("--output", output)
    load(file)
    for name, value in (("--first-images", first_images), ("--boundaries", boundaries)):
        if value is not None and not until_decided:
            raise ValueError(f"{name}: expected --until-decided, which alone has stages")
    from lmms_plugin.cli.study_display import Display
    from lmms_plugin.study.run import execution
    from lmms_plugin.study.run import until_decided as in_stages

    with Working("planning") as start:

        def watch(expected: dict[str, float | None], before: int, jobs: int) -> Display:
            start.stop()
            return Display(expected, before, jobs)

        work = execution.Work.on(output, watch, jobs=jobs, retry_failed=retry_failed, ray=ray, storage=storage)
        if until_decided:
            finished = in_stages.run(file, work, first=first_images, boundaries=boundaries)
        else:
            finished = execution.run(file, work)
    _tell(finished, output, in_stages=until_decided)


def _tell(finished: Finished, output: Path, *, in_stages: bool) -> None:
    """Print what a run of a study came to; the exit status is 1 while cells are missing."""
    from lmms_plugin.analysis.study_files import FAILURES, LOG
    from lmms_plugin.study.run import planning

    typer.echo(planning.summary(finished.plan))
    for cell, problem in finished.problems.items():
        typer.echo(f"failed: {cell}: {' '.join(problem.split())} (its log: {output / FAILURES / cell / LOG})", err=True)
    if not finished.complete:
        if in_stages:
            typer.echo("Not decided: cells of the last stage are missing; the same command goes on with them", err=True)
        elif finished.plan.study.analysis is not None:
            typer.echo(planning.without_analysis(finished.plan, output), err=True)
        raise typer.Exit(1)
    for line in (line for one in finished.conclusions or () for line in one.sentences):
        typer.echo(line)
    typer.echo(planning.on_one_page(output))


@app.command("analyse")
def analyse_study(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study, with all of its cells.")],
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Study file with another analysis; by default the one as run.")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Analyse what is there though cells are missing.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Print every finding and table.")] = False,
) -> None:
    """Repeat the analysis that the study file asks for on all finished cells, whatever version of the code ran them."""
    if file is not None:
        load(file)
    from lmms_plugin.analysis.study_files import VERDICT_IN_WORDS
    from lmms_plugin.cli.screens.verdict_screen import verdict_screen
    from lmms_plugin.study.verdicts import completeness, conclusions

    with Working("analysing"):
        found = completeness.analyse(folder, file, partial=partial)
    if not everything:
        typer.echo(verdict_screen(found, folder / VERDICT_IN_WORDS))
        return
    for one in found:
        typer.echo(conclusions.markdown(one))
