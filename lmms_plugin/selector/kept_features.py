"""Features of finished runs, found where their model arguments say that they were kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import TaskRecords
from lmms_plugin.arguments import arguments_of

if TYPE_CHECKING:
    from lmms_plugin.selector.features import Store

REMEDY = "run it again with features=DIR among its --model_args, or weigh by confidences (--reweigh-by confidences)"


class RunFeatures:
    """Reader of the features of several runs; each folder is read once."""

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}

    def kept(self, run: LoggedRun) -> bool:
        """Return whether the run was asked to keep features."""
        return _folder(run) is not None

    def __call__(self, name: str, run: LoggedRun, records: TaskRecords) -> npt.NDArray[np.float64]:
        """Return the features of all answers of a task as the Selector takes them, shape (n, 3·width + 1).

        The log-probability of an answer whose reasoning did not end is NaN.

        Raises:
            ValueError: Features are missing, not finite, or belong to other answers; one line that tells the run's
                name, and what to do.
        """
        folder = _folder(run)
        if folder is None:
            raise ValueError(f"expected features of {name} ({run.file}), which kept none: {REMEDY}")
        if not Path(folder).is_dir():
            raise ValueError(
                f"expected the features of {name} in {folder}, as its --model_args say, which is no folder here: start"
                f" this in the folder that the run was started in; else {REMEDY}"
            )
        # They load torch, which a command without features need not wait for.
        from lmms_plugin.selector.features import read
        from lmms_plugin.selector.training import features_of

        try:
            if folder not in self._stores:
                self._stores[folder] = read(Path(folder))
            found = features_of(records, self._stores[folder])
        except ValueError as error:
            raise ValueError(f"features of {name} in {folder}: {error}: {REMEDY}") from error
        matrix = found.matrix().double().numpy()
        # A hidden state that overflowed says nothing, and would count as one that is unknown.
        broken = np.isinf(matrix).any(axis=1) | np.isnan(matrix[:, :-1]).any(axis=1)
        if broken.any():
            raise ValueError(
                f"expected finite features of {name} in {folder}, got others of {broken.sum()} of {broken.size} answers"
                f" of {records.task}, e.g. document {records.numbers[broken][0]}: {REMEDY}"
            )
        return matrix


def _folder(run: LoggedRun) -> str | None:
    told = arguments_of(run.model_args).get("features")
    return None if told in (None, "", "None") else str(told)
