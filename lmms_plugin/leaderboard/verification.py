"""What must hold before a submission stands on a leaderboard.

Everything that can be made again from the answers is made again: scores of documents, metrics, intervals and the
records of Every Eval Ever. What cannot be told from files alone is whether the model gave these answers at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import format_exception_only
from typing import Any, NamedTuple

import numpy as np

from lmms_plugin.analysis.logs import read
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.records import TaskKind
from lmms_plugin.analysis.study_files import CELL
from lmms_plugin.export import consistency, every_eval_ever, facts, record_types
from lmms_plugin.export.asked_documents import documents
from lmms_plugin.export.every_eval_ever import EvaluationSource
from lmms_plugin.export.measured import VerifiedRun, VerifiedScore, measured
from lmms_plugin.export.rescoring import difference
from lmms_plugin.leaderboard import submission
from lmms_plugin.leaderboard.submission import Manifest
from lmms_plugin.quant_backends.plans.report_schema import REPORT
from lmms_plugin.utils import hashing
from lmms_plugin.utils.files import json_object

LONGEST_REASON = 600
"""Characters of a reason that are shown: it may quote what a stranger wrote."""

LONGEST_FACT, LONGEST_ARGUMENTS = 200, 4000
"""Characters of what a submission says of itself, and of the arguments of its model."""


class Answered(NamedTuple):
    """A task of a submission that holds.

    Attributes:
        kind: What it asks for.
        scores: Metric → score.
        higher_is_better: Metric → whether more of it is better.
        count: Documents answered.
        images: Images these are of.
        documents: SHA-256 of what was asked.
    """

    kind: TaskKind
    scores: Mapping[str, VerifiedScore]
    higher_is_better: Mapping[str, bool]
    count: int  # type: ignore[assignment]
    images: int
    documents: str


@dataclass(frozen=True, eq=False)
class Verified:
    """A submission of which everything holds that it can show by itself.

    Attributes:
        name: Of its folder or zip.
        source: Who says so.
        digest: SHA-256 of the manifest, and so of every file.
        answers: SHA-256 of all answers with their log-probabilities.
        facts: What the run says of quantization, as text.
        tasks: By name.
    """

    name: str
    source: EvaluationSource
    digest: str
    answers: str
    facts: Mapping[str, str]
    tasks: Mapping[str, Answered]


@dataclass(frozen=True)
class Refused:
    """A submission that does not hold.

    Attributes:
        name: Of its folder or zip.
        reason: What was expected and what came.
    """

    name: str
    reason: str


def verify(path: Path, settings: MeasurementSettings) -> Verified | Refused:
    """Check one submission by itself; whatever is wrong with it, it is refused and nothing is raised.

    Args:
        path: Its folder or zip.
        settings: Of the leaderboard's intervals. A submission's own are checked as it made them, and not shown.
    """
    try:
        with submission.opened(path) as folder:
            return _verified(path, folder, settings)
    except Exception as error:
        # Strangers write submissions: what a damaged zip or JSON of an unexpected shape raises cannot be listed, and
        # one of them must not keep the others from the page.
        return Refused(_readable(path.name)[:LONGEST_FACT], _reason(error))


def agreeing(found: Sequence[Verified], reference: Mapping[str, str]) -> tuple[list[Verified], list[Refused]]:
    """Keep submissions that answered the same documents.

    Args:
        found: Verified one by one.
        reference: Task → documents that are known to be the right ones; for other tasks those count that more than
            half of the submissions agree on.

    Returns:
        Those that agree, and those that do not.
    """
    right = _majority(found) | dict(reference)
    kept, refused = [], []
    for one in found:
        wrong = [task for task, answered in one.tasks.items() if right.get(task) != answered.documents]
        if not wrong:
            kept.append(one)
            continue
        known = "the reference" if wrong[0] in reference else "most submissions"
        none = wrong[0] not in right
        expected = (
            "documents that most submissions agree on, got none; name a --reference"
            if none
            else (f"the documents of {known}, got others")
        )
        refused.append(Refused(one.name, f"task {wrong[0]}: expected {expected}"))
    return kept, refused


def _reason(error: Exception) -> str:
    """Why a submission was refused: our own words where the error is ours, else its type, too."""
    text = str(error) if type(error) is ValueError else "damaged: " + "".join(format_exception_only(error)).strip()
    readable = _readable(text)
    return readable if len(readable) <= LONGEST_REASON else f"{readable[:LONGEST_REASON]} …"


def _readable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _verified(path: Path, folder: Path, settings: MeasurementSettings) -> Verified:
    submission.expect_readable(folder)
    _expect_shown("name", path.name, LONGEST_FACT)
    manifest = Manifest.read(folder)
    _expect_files(folder, manifest)
    run = read(submission.results_file(folder))
    claimed = measured(run, replace(manifest.settings, workers=settings.workers))
    told = facts.quantization(run, claimed.results)
    for name, value in told.items():
        _expect_shown(f"fact {name!r:.80}", name, LONGEST_FACT)
        _expect_shown(f"fact {name!r:.80}", value, LONGEST_ARGUMENTS if name == "model_args" else LONGEST_FACT)
    _expect_nothing_else(folder, manifest, claimed)
    _expect_records(folder, manifest, claimed)
    found = claimed.at(settings)
    answers = {task: consistency.digest(rescored.samples) for task, rescored in sorted(found.tasks.items())}
    return Verified(
        name=path.name.removesuffix(".zip"),
        source=manifest.source,
        digest=hashing.of_file(folder / submission.MANIFEST),
        answers=hashing.of_value(answers),
        facts=told,
        tasks={task: _answered(found, task) for task in found.tasks},
    )


def _expect_shown(what: str, text: str, most: int) -> None:
    """What stands on the page must be fit to be shown: characters that change direction would show something else."""
    if not text.isprintable() or len(text) > most:
        raise ValueError(f"{what}: expected at most {most} printable characters, got {text!r:.80}")


def _answered(found: VerifiedRun, task: str) -> Answered:
    answered = found.run.tasks[task]
    return Answered(
        kind=answered.kind,
        scores=found.scores[task],
        higher_is_better=found.tasks[task].definition.higher_is_better,
        count=answered.ids.size,
        images=np.unique(answered.images).size,
        documents=documents(found.run, task),
    )


def _expect_files(folder: Path, manifest: Manifest) -> None:
    found = submission.digests(folder)
    for name in sorted(manifest.files.keys() - found.keys()):
        raise ValueError(f"{name} is missing")
    for name in sorted(found.keys() - manifest.files.keys()):
        raise ValueError(f"{name} is not in {submission.MANIFEST}")
    for name, digest in found.items():
        if digest != manifest.files[name]:
            raise ValueError(f"{name} was changed: expected SHA-256 {manifest.files[name]}, got {digest}")


def _expect_nothing_else(folder: Path, manifest: Manifest, found: VerifiedRun) -> None:
    """A file that nothing reads is checked by nobody."""
    read = {found.run.file, *map(found.run.log, found.run.tasks)}
    read |= {found.run.file.with_name(name) for name in (CELL, REPORT)}
    read |= {folder / file for file in every_eval_ever.paths(found, manifest.source)}
    for name in sorted(manifest.files):
        if folder / name not in read:
            raise ValueError(f"{name} belongs to no submission of {', '.join(found.tasks)}")


def _expect_records(folder: Path, manifest: Manifest, found: VerifiedRun) -> None:
    """Both records must be valid and be those that this package makes of the answers."""
    files = every_eval_ever.paths(found, manifest.source)
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{file.as_posix()} is missing")
    lines = (folder / files.instances).read_bytes()
    rows = []
    for number, line in enumerate(lines.splitlines(), start=1):
        name = f"{files.instances.name}, record {number}"
        rows.append(json_object(line, name))
        record_types.read(record_types.DocumentRecord, rows[-1], name)
    made = [record.content() for record in every_eval_ever.instances(found, manifest.source)]
    _expect_same(made, rows, files.instances)
    whole = json_object((folder / files.aggregate).read_bytes(), files.aggregate.name)
    record_types.read(record_types.RunRecord, whole, files.aggregate.name)
    made_whole = every_eval_ever.aggregate(found, manifest.source, files, lines, len(made)).content()
    # What another version of this package calls itself is no claim.
    made_whole["eval_library"]["additional_details"]["lmms_plugin"] = manifest.lmms_plugin
    _expect_same(made_whole, whole, files.aggregate)


def _expect_same(made: Any, found: Any, file: Path) -> None:
    if isinstance(made, list) and len(made) != len(found):
        raise ValueError(f"{file.name}: expected {len(made)} records, got {len(found)}")
    if differs := difference(made, found):
        raise ValueError(f"{file.name}: it is not what the answers give: {differs}")


def _majority(found: Sequence[Verified]) -> dict[str, str]:
    right = {}
    for task in dict.fromkeys(task for one in found for task in one.tasks):
        counts = Counter(one.tasks[task].documents for one in found if task in one.tasks)
        digest, count = counts.most_common(1)[0]
        if 2 * count > counts.total():
            right[task] = digest
    return right
