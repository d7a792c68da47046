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


def main() -> None:
    """Entry point: errors a user can cause become one line and exit status 2."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"lmms-plugin: {error}", err=True)
        sys.exit(2)
