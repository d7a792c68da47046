"""The commands `lmms-plugin export`, `lmms-plugin leaderboard` and `lmms-plugin quantize`."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmms_plugin.cli.terminal import Working, each
from lmms_plugin.utils.messages import counted
from lmms_plugin.utils.outputs import expect_folder

if TYPE_CHECKING:
    from lmms_plugin.analysis.logs import LoggedRun
    from lmms_plugin.analysis.measure import MeasurementSettings
    from lmms_plugin.export.every_eval_ever import EvaluationSource
    from lmms_plugin.export.hub import BenchmarkEntry
    from lmms_plugin.export.measured import VerifiedRun
    from lmms_plugin.export.record_types import Relationship

_GGUF = "gguf"
Resamples = Annotated[int, typer.Option(min=1, help="Resamples of the images for every interval.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the resamples.")]
Level = Annotated[float, typer.Option(help="Confidence level of the intervals.")]


class Format(StrEnum):
    """Formats that a run can be exported to."""

    SUBMISSION = "submission"
    EVERY_EVAL_EVER = "every-eval-ever"
    EVAL_RESULTS = "eval-results"
    MODEL_INDEX = "model-index"


_FILED = {Format.SUBMISSION, Format.EVERY_EVAL_EVER}


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (export, leaderboard, quantize):
        app.command()(command)


def export(
    results: Annotated[Path, typer.Argument(help="Results file or folder of one run.")],
    formats: Annotated[list[Format], typer.Option("--format", help="May be given again.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; for a submission a new one.")],
    model_id: Annotated[
        str | None, typer.Option(help="Id of the model, organization/name; by default the checkpoint's, if on the hub.")
    ] = None,
    organization: Annotated[str | None, typer.Option(help="Organization that ran the evaluation.")] = None,
    relationship: Annotated[
        str | None, typer.Option(help="Of it to the model: first_party, third_party, collaborative or other.")
    ] = None,
    collection: Annotated[str, typer.Option(help="Under which Every Eval Ever files the records.")] = "lmms-plugin",
    archive: Annotated[bool, typer.Option("--zip", help="Also pack the submission as a zip.")] = False,
    dataset_id: Annotated[str | None, typer.Option(help="The benchmark's dataset on the hub.")] = None,
    task_id: Annotated[str | None, typer.Option(help="Its task in that dataset's eval.yaml.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of the run whose number goes to the hub.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric whose value goes to the hub.")] = None,
    percent: Annotated[bool, typer.Option("--percent", help="Write that value in percent.")] = False,
    source_url: Annotated[str | None, typer.Option(help="Where the evaluation can be looked at.")] = None,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    level: Level = 0.95,
) -> None:
    """Export a run for leaderboards: its answers are scored again first, and every record is validated."""
    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.export import hub
    from lmms_plugin.export.every_eval_ever import EvaluationSource
    from lmms_plugin.export.measured import measured
    from lmms_plugin.leaderboard import submission

    expect_folder("--output", output)
    settings = _settings(resamples, seed, level)
    who = _filed_by(organization, relationship) if _FILED & {*formats} else None
    asked = Format.EVAL_RESULTS in formats
    entry = _benchmark(dataset_id, task_id, task, metric, percent, source_url) if asked else None
    if Format.SUBMISSION in formats:
        submission.expect_checkable(settings)
    run = read_one(results)
    source = who and EvaluationSource(_model_id(run, model_id), *who, collection, int(time.time()))
    name = _model_id(run, model_id).partition("/")[2] if Format.MODEL_INDEX in formats else ""
    if Format.MODEL_INDEX in formats:
        hub.expect_datasets(run, dataset_id)
    with Working("resampling"):
        found = measured(run, settings)
    if source:
        _file(found, source, output, submitted=Format.SUBMISSION in formats, archive=archive)
    if entry is not None:
        typer.echo(str(hub.write_eval_results(found, entry, output)))
    if name:
        typer.echo(str(hub.write_model_index(found, name, dataset_id, output)))


def _settings(resamples: int, seed: int, level: float) -> MeasurementSettings:
    from lmms_plugin.analysis.measure import MeasurementSettings

    return MeasurementSettings(None, resamples, seed, level, workers=os.cpu_count() or 1)


def _file(found: VerifiedRun, source: EvaluationSource, output: Path, *, submitted: bool, archive: bool) -> None:
    """Write a submission, or records of Every Eval Ever alone, and say what was checked."""
    from lmms_plugin.export import every_eval_ever
    from lmms_plugin.leaderboard import submission

    if submitted:
        checked = submission.build(found, source, output)
        typer.echo(f"The submission has {counted(len(found.tasks), 'task')}.\n{output}")
        if archive:
            typer.echo(str(submission.pack(output)))
    else:
        files, checked = every_eval_ever.write(found, source, output)
        typer.echo(str(output / files.aggregate))
    typer.echo(checked, err=True)


def _benchmark(
    dataset_id: str | None,
    task_id: str | None,
    task: str | None,
    metric: str | None,
    percent: bool,
    source_url: str | None,
) -> BenchmarkEntry:
    from lmms_plugin.export.hub import BenchmarkEntry

    ids = _named(dataset_id, "--dataset-id", "the benchmark's dataset on the hub")
    its_task = _named(task_id, "--task-id", "the task in that dataset's eval.yaml")
    ranked_by = _named(metric, "--metric", "the metric that this benchmark ranks by")
    return BenchmarkEntry(ids, its_task, task, ranked_by, 100.0 if percent else 1.0, source_url)


def leaderboard(
    submissions: Annotated[list[Path], typer.Argument(help="Submissions, each a folder or a zip.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, the JSON and the CSV.")],
    reference: Annotated[
        Path | None, typer.Option(help="Results of your own whose documents all submissions must have answered.")
    ] = None,
    datasets: Annotated[
        bool, typer.Option("--datasets", help="Load the tasks' datasets: submissions must have answered all of them.")
    ] = False,
    resamples: Resamples = 1000,
    seed: Seed = 0,
    level: Level = 0.95,
) -> None:
    """Verify submissions and build a leaderboard of the valid ones.

    The exit status is 1 if one is not valid.
    """
    from loguru import logger

    from lmms_plugin.analysis.logs import find, read
    from lmms_plugin.export.asked_documents import documents
    from lmms_plugin.export.true_documents import true_documents
    from lmms_plugin.leaderboard import board
    from lmms_plugin.leaderboard.verification import Refused, Verified, agreeing, verify

    expect_folder("--output", output)
    settings = _settings(resamples, seed, level)
    known = {
        task: documents(run, task) for run in (map(read, find(reference)) if reference else ()) for task in run.tasks
    }
    checked = list(each((verify(path, settings) for path in submissions), "verifying"))
    verified = [one for one in checked if isinstance(one, Verified)]
    refused = [one for one in checked if isinstance(one, Refused)]
    if datasets:
        logger.disable("lmms_eval")
        known |= true_documents(dict.fromkeys(task for one in verified for task in one.tasks))
    verified, others = agreeing(verified, known)
    refused += others
    board.write(board.tables(verified), refused, settings, output)
    for one in refused:
        typer.echo(f"refused: {one.name}: {one.reason}", err=True)
    told = f"{len(verified)} {'was' if len(verified) == 1 else 'were'} verified and {len(refused)} refused"
    # A path is to be copied, so it is not cut.
    typer.echo(f"Of {counted(len(checked), 'submission')} {told}.\n{output / 'leaderboard.html'}")
    if refused:
        raise typer.Exit(1)


def quantize(
    model_args: Annotated[str, typer.Argument(help="As after --model_args, with method=: pretrained=demo,method=rtn.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the checkpoint.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, compressed-tensors, own: this package's, which holds everything, or gguf (type=Q8_0).",
        ),
    ] = "auto",
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's convert_hf_to_gguf.py, or a program that runs it; for --format gguf."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON what was written.")] = False,
) -> None:
    """Quantize a model and write a checkpoint for serving.

    Which engines can load it is printed.
    """
    from loguru import logger

    from lmms_plugin.quantize import Asked
    from lmms_plugin.utils.processes.quiet import no_bars, stdout_to_stderr

    logger.remove()
    if converter is not None and form != _GGUF:
        raise ValueError(f"--converter has no effect on --format {form}: leave it out, or take --format {_GGUF}")
    if form == _GGUF:
        _write_gguf(model_args, output, converter, json=json)
        return
    asked = Asked.to_write(model_args, output, form, "--output")
    # Only now, since it imports torch and transformers.
    from lmms_plugin.export import checkpoint

    no_bars()
    with stdout_to_stderr(), Working("loading and quantizing"):
        saved = checkpoint.quantize(asked, output, form, "--output")
    lines = list(checkpoint.readers(saved, output))
    if json:
        typer.echo(dumps({**saved._asdict(), "readers": lines}, indent=1))
        return
    typer.echo(f"{output}: {saved.format}, {saved.bytes / 1e6:.1f} MB; loaded by")
    for line in lines:
        typer.echo(f"- {line}")


def _write_gguf(model_args: str, output: Path, converter: Path | None, *, json: bool) -> None:
    from lmms_plugin.quantize import write_gguf
    from lmms_plugin.utils.messages import command_line
    from lmms_plugin.utils.processes.quiet import stdout_to_stderr

    with stdout_to_stderr(), Working("reading and writing"):
        model = write_gguf(model_args, output, converter=converter, option="--output")
    loaded = [
        command_line(("lmms-eval", "--model", "quant_gguf", "--model_args", f"pretrained={output}")),
        f"llama.cpp: llama-server --model {model.text.path.name} --mmproj {model.vision.path.name}",
    ]
    if json:
        typer.echo(dumps({"format": _GGUF, **model.to_dict(), "readers": loaded}, indent=1))
        return
    typer.echo(f"{model.table()}\n{output}: loaded by")
    for line in loaded:
        typer.echo(f"- {line}")


def _filed_by(organization: str | None, relationship: str | None) -> tuple[str, Relationship]:
    """Return what only the user knows, so that it is asked for before minutes are spent: organization, relationship."""
    from lmms_plugin.export.every_eval_ever import RELATIONSHIPS, expect_relationship

    who = _named(organization, "--organization", "the organization that ran the evaluation")
    what = f"its relationship to the model, {', '.join(RELATIONSHIPS)}"
    return who, expect_relationship(_named(relationship, "--relationship", what))


def _model_id(run: LoggedRun, given: str | None) -> str:
    """Return the model's id: the given one, else that of a checkpoint on the hub."""
    from lmms_plugin.export import facts
    from lmms_plugin.export.every_eval_ever import HUB_ID

    checkpoint = facts.checkpoint(run) or ""
    # A relative path looks like a hub id as well.
    on_hub = HUB_ID.fullmatch(checkpoint) and not Path(checkpoint).exists()
    what = f"the model's id, organization/name; the run used {checkpoint!r}"
    return given or (checkpoint if on_hub else _named(None, "--model-id", what))


def _named(value: str | None, option: str, what: str) -> str:
    if not value:
        raise ValueError(f"{option} is missing: {what}")
    return value
