"""Facts that a run logs about itself and that bear on its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmms_plugin.analysis import axes
from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.parity.pairs import answers_of
from lmms_plugin.analysis.reproduction.published import NamedBy
from lmms_plugin.arguments import arguments_of
from lmms_plugin.protocol.dialects import DIALECTS

_LOCAL = "parquet"
"""Path under which tasks load local copies of their datasets."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run on one task.

    Attributes:
        named_by: What says which published model the checkpoint is.
        given: Model arguments that change answers, name → value.
        engine: Facts about the engine as `lmms_plugin.vlm.engine_facts` writes them; empty where the run logs none.
        dialect: Name of the dialect that boxes were asked for in; "" if unknown.
        without_box: Share of answers without a box, in [0, 1].
        unfinished: Share of answers that end inside their reasoning, in [0, 1].
        local_copy: Whether the dataset was a local copy.
    """

    named_by: NamedBy = NamedBy.ID
    given: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    dialect: str = ""
    without_box: float = 0.0
    unfinished: float = 0.0
    local_copy: bool = False

    @property
    def generic(self) -> bool:
        """Whether boxes were asked for in generic words, for want of a published way."""
        return self.dialect in DIALECTS and not DIALECTS[self.dialect].published


def checkpoint_of(run: LoggedRun) -> str:
    """Return the checkpoint of a run of the unquantized model.

    Raises:
        ValueError: Another model ran, or keys and values were quantized: published numbers are of the unquantized one.
    """
    place = axes.of(run.file, run.file, run.content)
    if not place.config.dense:
        raise ValueError(
            f"expected a run of the unquantized model (quant_none), of which the published numbers are, got"
            f" {place.config.label}: {run.label:.200}"
        )
    # The default of `pretrained` is logged nowhere else.
    return str(arguments_of(run.content.get("config", {}).get("model_args")).get("pretrained") or place.checkpoint)


def facts_of(run: LoggedRun, task: str, named_by: NamedBy) -> RunFacts:
    """Collect the facts of a run on one task.

    Raises:
        ValueError: A log or the trailer of an answer is damaged.
    """
    options = axes.of(run.file, run.file, run.content).config.options
    pairs = (option.partition("=") for option in options)
    given = {name: value for name, _, value in pairs if name != "limit"}
    answers, engine = answers_of(run, task)
    dialects = {response.dialect for response, _ in answers.values() if response.dialect}
    parsed, unfinished = run.tasks[task].parsed, run.results[task].get("unfinished_rate,none")
    stopped = float(unfinished) if isinstance(unfinished, float | int) and not math.isnan(unfinished) else 0.0
    return RunFacts(
        named_by,
        given,
        engine,
        min(dialects, default=""),
        float(1.0 - parsed.mean()),
        stopped,
        run.content["configs"][task].get("dataset_path") == _LOCAL,
    )
