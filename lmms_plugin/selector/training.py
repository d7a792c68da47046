"""Learned confidence from finished runs: a results folder of lmms-eval joined with the features of its answers."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.analysis.logs import LoggedRun
from lmms_plugin.analysis.records import TaskRecords
from lmms_plugin.confidence.estimators import LEARNED
from lmms_plugin.selector.features import Features, Store, key
from lmms_plugin.selector.network import Selector, SelectorSettings, fit
from lmms_plugin.utils import hashing
from lmms_plugin.utils.files import new_folder

TRAINED = "dev"
"""Part for training of a task that brings its own split."""


class Answers(NamedTuple):
    """n answers with their features.

    Attributes:
        features: Of each.
        target: (n,) right or wrong, or soft accuracy, in [0, 1].
        images: (n,) ids of the images.
    """

    features: Features
    target: npt.NDArray[np.float64]
    images: list[str]


def features_of(records: TaskRecords, store: Store) -> Features:
    """The features of all answers of a task, in its order.

    Raises:
        ValueError: If some are missing, or belong to other answers: the probability of an answer tells.
    """
    keys = [key(records.task, number) for number in records.numbers.tolist()]
    missing = [name for name in keys if name not in store.index]
    if missing:
        raise ValueError(f"expected features of all answers, but {len(missing)} of {len(keys)} lack, e.g. {missing[0]}")
    found = store.features.rows([store.index[name] for name in keys])
    logged, kept = records.confidence_by("joint"), np.exp(found.logprob.double().numpy())
    # Log-probabilities of tokens are logged with six decimals.
    differ = np.flatnonzero(~np.isclose(kept, logged, rtol=1e-3, atol=1e-6, equal_nan=True))
    if differ.size:
        k = differ[0]
        raise ValueError(
            f"expected the features of these very answers, but {differ.size} of {len(keys)} have another probability, "
            f"e.g. {keys[k]}: {kept[k]:.6f} with its features, {logged[k]:.6f} in the log"
        )
    return found


def train(run: LoggedRun, store: Store, settings: SelectorSettings, tasks: Sequence[str] = ()) -> Selector:
    """Train a selector on a run.

    Args:
        run: With a log of samples.
        store: Features of its answers.
        settings: Of the training.
        tasks: Names of the tasks to train on; () for all of this package. Of a task with a split of its own, the part
            `dev` is used.

    Raises:
        ValueError: If a task is missing or has no part to train on, kinds of tasks are mixed, features do not belong to
            the run, or there is nothing to learn.
    """
    if absent := sorted(set(tasks) - set(run.tasks)):
        raise ValueError(f"expected tasks of {run.file} ({', '.join(run.tasks)}), got {', '.join(absent)}")
    chosen = [run.tasks[name] for name in tasks or run.tasks]
    if not chosen:
        raise ValueError(f"expected tasks of this package in {run.file}, got {', '.join(run.others) or 'none'}")
    kinds = {records.kind for records in chosen}
    if len(kinds) > 1:
        raise ValueError(f"expected tasks of one kind, got {', '.join(records.task for records in chosen)}")
    parts = [_to_learn_from(records, store) for records in chosen]
    kind = chosen[0].kind
    data = {"tasks": [records.task for records in chosen], "documents": _digest(chosen), "run": run.label}
    return fit(
        Features.joined([part.features for part in parts]),
        np.concatenate([part.target for part in parts]),
        [image for part in parts for image in part.images],
        settings,
        origin=store.origin,
        predicts=kind.record if kind.right is None else f"{kind.record} >= {kind.right:g}",
        data=data,
    )


def apply(run: LoggedRun, store: Store, selector: Selector, output: Path, *, transfer: bool = False) -> str:
    """Copy a run into a new folder, with the selector's confidence in its logs.

    Args:
        run: With a log of samples.
        store: Features of its answers.
        selector: Trained on other images.
        output: A folder that does not exist or is empty.
        transfer: Whether it may have been trained for another model or quantization.

    Returns:
        The name under which the confidence is logged.

    Raises:
        FileExistsError: If there is something in `output`.
        ValueError: If the selector was trained for something else or on images of the run, or features do not belong to
            the run.
    """
    name = _name(selector, store, transfer)
    confidences = {}
    for task, records in run.tasks.items():
        if seen := selector.seen_among(records.images.tolist()):
            raise ValueError(f"expected images that the selector was not trained on, but {task} holds {len(seen)} such")
        values = selector.confidence(features_of(records, store)).round(6).tolist()
        known = [None if math.isnan(value) else value for value in values]
        confidences[task] = dict(zip(records.numbers.tolist(), known, strict=True))
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"expected a new folder, but {output} holds files")
    with new_folder(output) as unfinished:
        for task, records in run.tasks.items():
            log = run.log(task)
            with log.open(encoding="utf-8") as lines, (unfinished / log.name).open("w", encoding="utf-8") as copy:
                for line in lines:
                    row = json.loads(line)
                    row[records.kind.record]["confidence"][name] = confidences[task][row["doc_id"]]
                    copy.write(json.dumps(row) + "\n")
        shutil.copy(run.file, unfinished)
    return name


def summary(selector: Selector) -> dict[str, Any]:
    """What a selector is, for people to read."""
    record = selector.record
    best = record.epochs[record.best]
    return {
        "predicts": record.target,
        **record.data,
        "images to train on": record.images[0],
        "images to stop by": record.images[1],
        "epochs": f"{len(record.epochs) - 1}, number {record.best} kept (0 is the probability alone)",
        "cross-entropy": f"{best.training:.4f} in training, {best.held_out:.4f} on held-out images",
        "feature layer": record.origin.layer,
        "model": record.origin.model,
        "quantization": json.dumps(record.origin.quantization),
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }


def _to_learn_from(records: TaskRecords, store: Store) -> Answers:
    keep = np.ones(records.ids.size, np.bool_)
    if np.any(records.parts != ""):
        keep = np.equal(records.parts, TRAINED)
    if not keep.any():
        held = ", ".join(sorted(set(records.parts.tolist())))
        raise ValueError(f"expected a part {TRAINED!r} of task {records.task} to train on, got {held}")
    features = features_of(records, store)
    # Where reasoning did not end there is no answer to learn from.
    keep &= ~np.isnan(features.logprob.numpy())
    features = features.rows(np.flatnonzero(keep).tolist())
    return Answers(features, records.outcome[keep], records.images[keep].tolist())


def _name(selector: Selector, store: Store, transfer: bool) -> str:
    differences = selector.record.origin.differences(store.origin)
    if differences and not transfer:
        raise ValueError(
            f"the selector was trained for another model (its own, then this one): {'; '.join(differences)};"
            " --transfer takes it all the same, and marks the results"
        )
    return LEARNED[bool(differences)]


def _digest(tasks: Sequence[TaskRecords]) -> str:
    """SHA-256 of what was asked."""
    asked = [
        (records.task, identifier, question)
        for records in tasks
        for identifier, question in zip(records.ids.tolist(), records.asked.tolist(), strict=True)
    ]
    return hashing.of_value(asked)
