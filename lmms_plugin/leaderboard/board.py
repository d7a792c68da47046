"""The board: verified submissions as one page, as JSON and as CSV, and refused submissions with the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from lmms_plugin import __version__
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.records import GROUNDING, REJECTION, VQA, TaskKind
from lmms_plugin.export.measured import VerifiedScore
from lmms_plugin.leaderboard.verification import Refused, Verified
from lmms_plugin.utils.files import encoded, replace_all
from lmms_plugin.utils.messages import counted
from lmms_plugin.utils.plain_json import plain
from lmms_plugin.utils.spreadsheets import comma_separated

COLUMNS: Mapping[TaskKind, tuple[str, ...]] = {
    GROUNDING: ("acc@0.5", "mean_iou", "parse_rate", "ece", "brier", "auroc", "aurc", "coverage@0.05"),
    VQA: ("accuracy", "ece", "brier", "auroc", "aurc", "coverage@0.05", "phi@10"),
    REJECTION: ("rejection_auroc", "rejection_fpr@0.95", "confidence_falls", "box_rate"),
}
"""Metrics shown by kind of task; the first one ranks. `leaderboard.json` has all."""
MISSING = "n/a"
_FACTS = ("quantization_method", "quantization_bits", "quantization_group_size", "quantization_bits_per_weight")


class BoardRow(NamedTuple):
    """One submission in the table of one task.

    Attributes:
        rank: Rank from 1, by the task's first metric; equal values share a rank.
        submission: Name of the folder or zip.
        model: Id of the model.
        organization: Organization that ran the evaluation.
        facts: Quantization of the run, as text.
        scores: All metrics.
        documents: Number of documents answered.
        images: Number of their images.
        digest: SHA-256 of the manifest.
        same_answers: Other submissions with the same answers and log-probabilities.
    """

    rank: int
    submission: str
    model: str
    organization: str
    facts: Mapping[str, str]
    scores: Mapping[str, VerifiedScore]
    documents: int
    images: int
    digest: str
    same_answers: tuple[str, ...]


class BoardTable(NamedTuple):
    """Table of one task.

    Attributes:
        task: Name of the task.
        columns: Metrics shown.
        higher_is_better: Metric → whether larger is better.
        estimator: Confidence estimator of the metrics.
        documents: SHA-256 of the documents that all answered.
        rows: Rows by rank.
    """

    task: str
    columns: tuple[str, ...]
    higher_is_better: Mapping[str, bool]
    estimator: str
    documents: str
    rows: tuple[BoardRow, ...]


def tables(verified: Sequence[Verified]) -> list[BoardTable]:
    """Return a table for every task that some submission answered, by name."""
    names = sorted({task for one in verified for task in one.tasks})
    return [_table(task, [one for one in verified if task in one.tasks]) for task in names]


def write(found: Sequence[BoardTable], refused: Sequence[Refused], settings: MeasurementSettings, folder: Path) -> None:
    """Write `leaderboard.html`, `leaderboard.json` and `leaderboard.csv` into a folder.

    Each of them states the settings of the intervals. Either all three are written, or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "lmms_plugin": __version__,
        "intervals": _intervals(settings) | {"method": "bootstrap over images"},
        "tasks": [table._asdict() for table in found],
        "refused": [{"submission": one.name, "reason": one.reason} for one in refused],
    }
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    lines = comma_separated(_lines(found, settings))
    made = {"json": text + "\n", "html": page(found, refused, settings), "csv": lines}
    replace_all({folder / f"leaderboard.{ending}": encoded(content) for ending, content in made.items()})


def page(found: Sequence[BoardTable], refused: Sequence[Refused], settings: MeasurementSettings) -> str:
    """Render the page: one file that needs no network."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "between": _between, "known": _known}
    source = (files("lmms_plugin.leaderboard") / "templates" / "leaderboard.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        tables=found,
        refused=refused,
        counted=counted,
        facts=_FACTS,
        intervals=_intervals(settings),
        version=__version__,
        submissions=_submissions(found),
    )


def _intervals(settings: MeasurementSettings) -> dict[str, float]:
    return {name: getattr(settings, name) for name in ("level", "resamples", "seed")}


def _submissions(found: Sequence[BoardTable]) -> int:
    return len({row.digest for table in found for row in table.rows})


def _table(task: str, verified: Sequence[Verified]) -> BoardTable:
    first = verified[0].tasks[task]
    present = {metric for one in verified for metric in one.tasks[task].scores}
    columns = tuple(metric for metric in COLUMNS[first.kind] if metric in present)
    ranked_by, sign = columns[0], -1.0 if first.higher_is_better[columns[0]] else 1.0
    ranking = [one.tasks[task].scores.get(ranked_by) for one in verified]
    values = [math.inf if score is None else sign * score.value for score in ranking]
    rows = [
        _row(task, one, 1 + sum(other < value for other in values), verified)
        for one, value in zip(verified, values, strict=True)
    ]
    ordered = tuple(sorted(rows, key=lambda row: (row.rank, row.submission)))
    return BoardTable(task, columns, first.higher_is_better, first.kind.estimator, first.documents, ordered)


def _row(task: str, one: Verified, rank: int, verified: Sequence[Verified]) -> BoardRow:
    answered, source = one.tasks[task], one.source
    same = tuple(other.name for other in verified if other is not one and other.answers == one.answers)
    about = (rank, one.name, source.model_id, source.organization, one.facts)
    return BoardRow(*about, answered.scores, answered.count, answered.images, one.digest, same)


def _lines(found: Sequence[BoardTable], settings: MeasurementSettings) -> Iterator[Sequence[object]]:
    head = ("task", "rank", "submission", "model", "organization", *_FACTS)
    made = _intervals(settings)
    yield (*head, "metric", "value", "low", "high", *made, "records", "images", "manifest_sha256")
    for table in found:
        for row in table.rows:
            known = [row.facts.get(name, "") for name in _FACTS]
            for metric, score in row.scores.items():
                ends = ["" if math.isnan(end) else repr(end) for end in (score.low, score.high)]
                place = (table.task, row.rank, row.submission, row.model, row.organization, *known)
                counts = (*made.values(), score.records, score.images)
                yield (*place, metric, repr(score.value), *ends, *counts, row.digest)


def _number(score: VerifiedScore | None) -> str:
    return MISSING if score is None else f"{score.value:z.3f}"


def _between(score: VerifiedScore | None) -> str:
    return "" if score is None or math.isnan(score.low) else f"{score.low:z.3f} … {score.high:z.3f}"


def _known(text: str | None) -> str:
    """Format a fact for the table: numbers with two decimals."""
    try:
        return MISSING if text is None else f"{float(text):.2f}".removesuffix(".00")
    except ValueError:
        return str(text)
