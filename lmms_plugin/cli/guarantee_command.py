"""The command `lmms-plugin guarantee`."""

from __future__ import annotations

from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmms_plugin.analysis.guarantees.covariate import Covariate
from lmms_plugin.analysis.guarantees.guarded_loss import GuardedLoss
from lmms_plugin.cli.measuring import AsJson, Estimator, Everything, print_json, print_tables
from lmms_plugin.cli.terminal import Working
from lmms_plugin.utils.files import encoded, replace_bytes
from lmms_plugin.utils.outputs import expect_file
from lmms_plugin.utils.plain_json import plain

if TYPE_CHECKING:
    from lmms_plugin.metrics.guarantees.risk_bounds import Bound


class BoundOption(StrEnum):
    """Bounds of a risk that hold for several answers per image."""

    BETTING = "betting"
    HOEFFDING_BENTKUS = "hoeffding-bentkus"


_BOUNDS: dict[BoundOption, Bound] = {
    BoundOption.BETTING: "betting",
    BoundOption.HOEFFDING_BENTKUS: "hoeffding-bentkus",
}

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run to choose the threshold on: the unquantized one.")]
On = Annotated[
    list[Path] | None, typer.Option(metavar="RUN", help="Run, or folder of runs, to judge it on; may be repeated.")
]
Risk = Annotated[float, typer.Option(help="Largest risk that is promised.")]
Level = Annotated[float, typer.Option(help="Probability with which it is, and of every verdict.")]
Loss = Annotated[GuardedLoss, typer.Option(help="What is promised to be rare.")]
Calibrate = Annotated[
    str | None, typer.Option(metavar="TASK", help="Task to choose on; by default the only clean one.")
]
Share = Annotated[
    float | None, typer.Option(help="Share of its images to choose on, the others are judged; by default 0.5 or all.")
]
Pilot = Annotated[float, typer.Option(help="Share of the images to choose on that decides what is tested.")]
PerImage = Annotated[bool, typer.Option("--per-image", help="Images count alike, instead of answers.")]
BoundOf = Annotated[BoundOption | None, typer.Option(help="By default exact for one answer per image, else betting.")]
Contain = Annotated[
    float | None, typer.Option(help="Also grow accepted boxes until they contain the true one this often.")
]
Reweigh = Annotated[
    bool, typer.Option("--reweigh", help="Also choose with images weighted as if they were those that are judged.")
]
ReweighBy = Annotated[
    Covariate | None,
    typer.Option(help="--reweigh by this; by default by features if all runs kept some, else by confidences."),
]
ImageSeed = Annotated[int, typer.Option(min=0, help="Seed of the choices of images.")]
Output = Annotated[Path | None, typer.Option(help="File for what --json prints; a report shows DIR/guarantee.json.")]


def guarantee(
    results: Run,
    on: On = None,
    everything: Everything = False,
    json: AsJson = False,
    risk: Risk = 0.05,
    level: Level = 0.95,
    loss: Loss = GuardedLoss.ERROR,
    calibrate: Calibrate = None,
    share: Share = None,
    pilot: Pilot = 0.25,
    per_image: PerImage = False,
    bound: BoundOf = None,
    estimator: Estimator = None,
    contain: Contain = None,
    reweigh: Reweigh = False,
    reweigh_by: ReweighBy = None,
    seed: ImageSeed = 0,
    output: Output = None,
) -> None:
    """Choose a threshold with a guaranteed risk, and judge it on runs.

    Say whether quantization and shift break the guarantee.
    """
    from lmms_plugin.analysis.guarantees.guarantee import guarantee_of
    from lmms_plugin.analysis.guarantees.guarantee_results import GuaranteeSettings
    from lmms_plugin.analysis.guarantees.guarantee_sentences import sentences
    from lmms_plugin.cli.screens.guarantee_screen import guarantee_screen, guarantee_tables
    from lmms_plugin.selector.kept_features import RunFeatures

    if output is not None:
        expect_file("--output", output)
    chosen: Bound | None = None if bound is None else _BOUNDS[bound]
    reweigh = reweigh or reweigh_by is not None
    settings = GuaranteeSettings(
        risk, level, loss, estimator, per_image, chosen, calibrate, share, pilot, seed, reweigh, contain, reweigh_by
    )
    with Working("reading and testing"):
        told = guarantee_of(results, on or (), settings, RunFeatures())
    everything_told = {"sentences": sentences(told)} | plain(told)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(output, encoded(dumps(everything_told, indent=1, ensure_ascii=False, allow_nan=False)))
    if json:
        print_json(everything_told)
    elif everything:
        print_tables(*guarantee_tables(told))
    else:
        typer.echo(guarantee_screen(told))
