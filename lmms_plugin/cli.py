"""The `lmms-plugin` command: what this package adds to lmms-eval, and the jobs lmms-eval has no command for.

Every error a user can cause is one line on standard error and a non-zero exit status.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def models() -> None:
    """List the models this package adds to lmms-eval (`lmms-eval models` lists built-in ones only)."""
    from lmms_plugin.quant_backends import get, names
    from lmms_plugin.registration import model_name

    for backend in names():
        summary = (get(backend).__doc__ or "").split("\n", 1)[0]
        typer.echo(f"{model_name(backend):24} {summary}")


@app.command()
def tasks(
    cells: Annotated[bool, typer.Option(help="Also list every single cell of the shift grids.")] = False,
) -> None:
    """List the tasks and groups this package adds to lmms-eval (`lmms-eval tasks list` never asks for plugins)."""
    from lmms_plugin.tasks import catalogue

    for task in catalogue.tasks(cells=cells):
        typer.echo(f"{task.name:44} {task.kind:6} {task.summary}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for results, table and pictures.")] = Path("demo_output"),
    bits: Annotated[int, typer.Option(help="Bits per weight of the quantized models.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Expressions per task; only for trying things out.")] = None,
) -> None:
    """Run quant_none, quant_rtn, quant_hqq and quant_awq on the embedded demo through lmms-eval and show one table."""
    from lmms_plugin.demo import run

    run.run(output, bits=bits, limit=limit)


@app.command()
def inspect(
    model_args: Annotated[str, typer.Argument(help="As after --model_args, with method=: pretrained=demo,method=awq.")],
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON, layer by layer.")] = False,
    held_out: Annotated[
        int, typer.Option(min=0, help="Samples to compare outputs on with the dense model's; 0 for none.")
    ] = 4,
) -> None:
    """Quantize a model and print the account of every layer, without evaluating anything."""
    from loguru import logger
    from transformers.utils import logging

    from lmms_plugin import inspection

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
    logging.disable_progress_bar()
    with inspection.stdout_to_stderr():
        report = inspection.inspect(model_args, held_out=held_out)
    typer.echo(report.to_json() if json else report.table())


def main() -> None:
    """Entry point: errors a user can cause become one line and exit status 2."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"lmms-plugin: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
