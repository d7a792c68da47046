"""Runs of lmms-eval in this process, with the files that its command writes."""

import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics
from lmms_eval.tasks import TaskManager

DATE = "20260101_000000"


def evaluate(folder, model, arguments, limit=24, tasks=("shapes_rec",), **options):
    """Run a model on tasks; the folder with results and logs."""
    torch.set_num_threads(1)
    reset_logged_metrics()
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        limit=limit,
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),
        **options,
    )
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name_sanitized = "run"
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=DATE)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    return folder
