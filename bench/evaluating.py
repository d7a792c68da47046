"""Runs of lmms-eval's evaluator in this process, one after another, written down as the command writes them.

For grids of many small runs, in which starting a process for each would take most of the time.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Evaluator:
    """lmms-eval with our tasks in view.

    Args:
        threads: Of torch.
    """

    def __init__(self, threads: int) -> None:
        from lmms_eval.models import get_model
        from lmms_eval.tasks import TaskManager

        torch.set_num_threads(threads)
        # Finding a model of ours is what makes lmms-eval see our tasks.
        get_model("quant_none")
        self._manager = TaskManager()
        logging.disable(logging.INFO)

    def run(
        self, model: str, model_args: str, tasks: Sequence[str], *, limit: int | None = None, folder: Path | None = None
    ) -> dict[str, Any]:
        """Evaluate a model and return lmms-eval's results.

        Args:
            model: Name of the model.
            model_args: Its arguments.
            tasks: Names of tasks.
            limit: Documents per task; None for all.
            folder: New folder for results file and logs of samples; it appears when they are complete.
        """
        from lmms_eval.evaluator import simple_evaluate

        results = simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=list(tasks),
            limit=limit,
            task_manager=self._manager,
            bootstrap_iters=0,
            log_samples=folder is not None,
        )
        if folder is not None:
            _write(results, model, model_args, folder)
        return dict(results)


def _write(results: dict[str, Any], model: str, model_args: str, folder: Path) -> None:
    from lmms_eval.loggers import EvaluationTracker

    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    tracker = EvaluationTracker(output_path=str(unfinished))
    tracker.general_config_tracker.log_experiment_args(model, model_args, "", "", 0)
    samples = results.pop("samples")
    results["config"]["model"] = model
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str="run")
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    unfinished.rename(folder)
