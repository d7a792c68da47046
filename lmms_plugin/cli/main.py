"""The `lmms-plugin` command: models and tasks for lmms-eval, and commands that lmms-eval lacks.

Every error that a user can cause is one line on standard error and a non-zero exit status; a study file or plan with
several errors gets a line for each.
"""

import os
import signal
import sys
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import TyperException

from lmms_plugin.cli import export as export_commands
from lmms_plugin.cli import measuring
from lmms_plugin.cli.guarantee_command import guarantee
from lmms_plugin.cli.measuring import AsJson, Estimator, Everything, Seed, print_json, print_tables
from lmms_plugin.cli.model_distance import distance
from lmms_plugin.cli.parity import parity
from lmms_plugin.cli.report import report
from lmms_plugin.cli.reproduce import reproduce
from lmms_plugin.cli.study import app as study
from lmms_plugin.cli.terminal import Working, each, write_anything
from lmms_plugin.utils.outputs import expect_file, expect_folder
from lmms_plugin.utils.reading.problems import lines_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # typer keeps the line breaks of every paragraph but the first.
    help="\n\n".join(" ".join(paragraph.split()) for paragraph in (__doc__ or "").split("\n\n")),
)
measuring.register(app)
export_commands.register(app)
app.add_typer(study, name="study")
app.command()(report)
app.command()(parity)
app.command()(distance)
app.command()(reproduce)
app.command()(guarantee)

_INTERRUPTED = 128 + signal.SIGINT


@app.command()
def models(everything: Everything = False) -> None:
    """List the models this package adds to lmms-eval.

    `lmms-eval models` lists built-in ones only.
    """
    from lmms_plugin.cli.screens.listings import models_screen
    from lmms_plugin.quant_backends import GGUF, SERVED, get, model_name, names

    found = [(model_name(backend), (get(backend).__doc__ or "").split("\n", 1)[0]) for backend in names()]
    found.append((model_name(SERVED), "A checkpoint behind an OpenAI-compatible server (vLLM, SGLang, ...)."))
    found.append((model_name(GGUF), "GGUF files in llama.cpp, whose server is started for the run."))
    if not everything:
        typer.echo(models_screen(found))
        return
    for name, summary in found:
        typer.echo(f"{name:24} {summary}")


@app.command()
def tasks(
    cells: Annotated[bool, typer.Option(help="Also list every single cell of the shift grids.")] = False,
    everything: Everything = False,
) -> None:
    """List the tasks and groups this package adds to lmms-eval.

    `lmms-eval tasks list` never asks for plugins.
    """
    from lmms_plugin.cli.screens.listings import tasks_screen
    from lmms_plugin.tasks.registry import catalogue

    found = catalogue.tasks(cells=cells)
    if not cells and not everything:
        typer.echo(tasks_screen(found))
        return
    for task in found:
        typer.echo(f"{task.name:44} {task.kind:6} {task.summary}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for results, table and pictures.")] = Path("demo_output"),
    bits: Annotated[int, typer.Option(help="Bits per weight of the quantized models.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Expressions per task; only for trying things out.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All 18 corruptions instead of one noise, blur, weather and digital each.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="GGUF files in llama.cpp beside quant_none and quant_rtn (extra gguf).")
    ] = False,
) -> None:
    """Run four models on the embedded demo and print one table.

    quant_none, quant_rtn, quant_hqq and quant_awq, through lmms-eval.
    """
    from lmms_plugin.cli.demo_display import DemoProgress, show
    from lmms_plugin.demo import run

    expect_folder("--output", output)
    run.run(output, bits, DemoProgress, show, limit, full=full, gguf=gguf)


@app.command()
def inspect(
    model_args: Annotated[
        str,
        typer.Argument(help="As after --model_args, with method=: pretrained=demo,method=awq; or a GGUF file."),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Print the whole table.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON, layer by layer.")] = False,
    held_out: Annotated[
        int, typer.Option(min=0, help="Samples to compare outputs on with the dense model's; 0 for none.")
    ] = 4,
) -> None:
    """Quantize a model and print its layers, or what a GGUF file is.

    Nothing is evaluated or written.
    """
    from loguru import logger

    from lmms_plugin import quantize
    from lmms_plugin.cli.screens.listings import report_screen
    from lmms_plugin.utils.processes.quiet import no_bars, stdout_to_stderr

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
    if model_args.lower().endswith(quantize.GGUF_SUFFIX) and "=" not in model_args:
        file = quantize.inspect_file(Path(model_args))
        typer.echo(file.to_json() if json else file.table() if everything else report_screen(*_said(file)))
        return
    asked = quantize.Asked.parse(model_args)
    # Only now, since this imports transformers.
    no_bars()
    with stdout_to_stderr(), Working("loading and quantizing"):
        report = quantize.inspect(asked, held_out=held_out)
    typer.echo(report.to_json() if json else report.table() if everything else report_screen(*_said(report)))


def _said(report: Any) -> tuple[str, list[str]]:
    """Return the line of totals of a report, and the other lines of its table."""
    total = report.total()
    return total, [line for line in report.table().splitlines() if line != total]


class PictureFormat(StrEnum):
    """File formats of pictures."""

    PNG = "png"
    SVG = "svg"
    PDF = "pdf"


@app.command()
def sensitivity(
    results: Annotated[Path, typer.Argument(help="Folder with results files of runs that differ in bits.")],
    metric: Annotated[list[str], typer.Option(help="Metric of lmms-eval's table; may be given again.")] = ["acc@0.5"],  # noqa: B006
    figure: Annotated[Path | None, typer.Option(help="Folder to draw one picture per grid into.")] = None,
    kind: Annotated[PictureFormat, typer.Option(help="Of the pictures.")] = PictureFormat.PNG,
    everything: Everything = False,
    json: AsJson = False,
    resamples: Annotated[int, typer.Option(min=2, help="Resamples of the runs for the intervals.")] = 200,
    seed: Seed = 0,
) -> None:
    """Estimate which component's bits decide a score.

    Vision tower, connector or language model (arXiv 2601.15287).
    """
    from lmms_plugin.analysis import component_importance as analysis
    from lmms_plugin.cli.printed_tables import sensitivity_table
    from lmms_plugin.cli.screens.analyses_screen import sensitivity_screen

    if figure is not None:
        expect_folder("--figure", figure)
    cells, left_out = analysis.read(results)
    for line in left_out:
        typer.echo(f"left out: {line}", err=True)
    grids = list(analysis.grids(cells, metric))
    if not grids:
        raise ValueError(f"expected runs of quantized models with {' or '.join(metric)} under {results}, got none")
    workers = os.cpu_count() or 1
    with Working("fitting forests"):
        found = [analysis.analyse(grid, resamples=resamples, seed=seed, workers=workers) for grid in grids]
    if figure is not None:
        figure.mkdir(parents=True, exist_ok=True)
        for one in found:
            analysis.draw(one, figure / f"{one.grid.file_name}.{kind}")
    if json:
        print_json([one.to_dict() for one in found])
        return
    if not everything:
        typer.echo(sensitivity_screen(found))
        return
    print_tables(*(sensitivity_table(one) for one in found))


@app.command()
def doctor(everything: Everything = False, json: AsJson = False) -> None:
    """Check all that a run needs, and print remedies.

    The exit status is 1 if a check fails.
    """
    from lmms_plugin.cli.screens.listings import doctor_screen
    from lmms_plugin.doctor import diagnosis

    rows = []
    for row in each(diagnosis.diagnose(), "checking"):
        rows.append(row)
        if everything and not json:
            typer.echo(row.line())
    if json:
        typer.echo(dumps([row.to_dict() for row in rows], indent=1, ensure_ascii=False))
    else:
        typer.echo(diagnosis.CLOSING if everything else doctor_screen(rows, diagnosis.CLOSING))
    if diagnosis.failed(rows):
        raise typer.Exit(1)


selector = typer.Typer(no_args_is_help=True, help="Learned confidence from finished runs; no model is loaded.")
app.add_typer(selector, name="selector")
RunFolder = Annotated[Path, typer.Argument(metavar="RESULTS", help="Results file or folder of one run.")]
FeatureFolder = Annotated[Path, typer.Option(help="What --model_args features= of that run named.")]


@selector.command("fit")
def fit_selector(
    results: RunFolder,
    features: FeatureFolder,
    output: Annotated[Path, typer.Option(help="File for the selector (.safetensors).")],
    task: Annotated[list[str] | None, typer.Option(help="Task to train on; may be repeated; by default all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order, dropout and held-out images.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the images that decide when to stop.")] = 0.2,
    hidden: Annotated[int, typer.Option(min=1, help="Units of each of the two hidden layers.")] = 768,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    epochs: Annotated[int, typer.Option(min=1, help="At most.")] = 128,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without improvement before it stops.")] = 10,
) -> None:
    """Train a selector on a run's answers. Do not train on images that results are reported on."""
    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.selector import training
    from lmms_plugin.selector.features import read
    from lmms_plugin.selector.network import SelectorSettings

    expect_file("--output", output)
    settings = SelectorSettings(hidden=hidden, lr=lr, epochs=epochs, patience=patience, held_out=held_out, seed=seed)
    with Working("training"):
        trained = training.train(read_one(results), read(features), settings, task or ())
    trained.save(output)
    for name, value in training.summary(trained).items():
        typer.echo(f"{name}: {value}")


@selector.command("apply")
def apply_selector(
    results: RunFolder,
    features: FeatureFolder,
    selector: Annotated[Path, typer.Option(help="File written by `lmms-plugin selector fit`.")],
    output: Annotated[Path, typer.Option(help="New folder for the run with the confidence in its logs.")],
    transfer: Annotated[bool, typer.Option(help="Take a selector of another model or quantization; marked.")] = False,
) -> None:
    """Add a selector's confidence to the logs of a run that kept features, for `metrics` and `compare`."""
    from lmms_plugin.analysis.logs import read_one
    from lmms_plugin.selector import training
    from lmms_plugin.selector.features import read
    from lmms_plugin.selector.network import Selector

    expect_folder("--output", output)
    # In the order of their sizes, so that a wrong one is told soon.
    learned, store, run = Selector.load(selector), read(features), read_one(results)
    name = training.apply(run, store, learned, output, transfer=transfer)
    typer.echo(f"{output}: use it as --estimator {name}")


@app.command()
def strength(
    results: RunFolder,
    features: FeatureFolder,
    estimator: Estimator = None,
    everything: Everything = False,
    json: AsJson = False,
) -> None:
    """Measure shifts by image features, beside what they cost.

    The features are the model's own; no label is used.
    """
    from lmms_plugin.analysis.logs import find, read_one
    from lmms_plugin.analysis.measure import MeasurementSettings

    settings = MeasurementSettings(estimator)
    find(results)
    # Only now, since these import torch.
    from lmms_plugin.cli.printed_tables import strength_table
    from lmms_plugin.cli.screens.analyses_screen import strength_screen
    from lmms_plugin.selector import shift_strength as measuring
    from lmms_plugin.selector.features import read

    store = read(features)
    found = measuring.strengths(read_one(results), store, settings)
    if json:
        print_json(found)
        return
    if not everything:
        typer.echo(strength_screen(found))
        return
    print_tables(strength_table(found, store))


def main() -> None:
    """Run the command; an error that a user can cause becomes one line (for a file, one each) and exit status 2."""
    write_anything()
    try:
        # Typer turns a keyboard interrupt into an exit status without a message.
        status = app(standalone_mode=False) or 0
    except TyperException as error:
        status = _misused(error)
    except typer.Abort:
        _say("interrupted")
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        for line in lines_of(error):
            _say(line)
        sys.exit(2)
    if status == _INTERRUPTED:
        _say("interrupted")
    sys.exit(status)


def _misused(error: TyperException) -> int:
    """Print what is wrong with the command line, or the help if it is empty, and return the exit status."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        # Where rich is installed, typer has already printed it.
        typer.echo(error.format_message(), err=True, nl=bool(error.format_message()))
    else:
        path = "lmms-plugin" if context is None else context.command_path
        said = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
        _say(f"error: {said}; see '{path} --help'")
    return error.exit_code


def _say(line: str) -> None:
    typer.echo(f"lmms-plugin: {line}", err=True)
