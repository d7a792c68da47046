"""Tables of the report: leader table, Pareto front, flips, costs, runs."""

import math
from collections.abc import Iterable, Sequence
from types import MappingProxyType

from lmms_plugin.analysis.axes import UNQUANTIZED
from lmms_plugin.analysis.logs import DEFAULT_ZONE
from lmms_plugin.analysis.measure import MetricValue
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.report.numbers import tables
from lmms_plugin.report.numbers.results_folder import Cost, ReportedRun
from lmms_plugin.report.numbers.summary import Line, Summary
from lmms_plugin.report.numbers.tables import Column, ReportTable, TableCell, number, text, whole
from lmms_plugin.utils.messages import counted

_OBJECTIVES = (("accuracy", -1.0), ("aurc", 1.0))

_CACHE_COLUMNS = (
    Column("Bits/KV", "Bits per element of the key-value cache, scales and zero points counted", better="low"),
    Column(
        "KV kB", "That cache as stored in its format, for the longest prompt of the run, in 10³ bytes", better="low"
    ),
)


def leader(summary: Summary) -> ReportTable:
    """Return every configuration under every condition, best accuracy first."""
    caches = any(line.cost.kv_bits is not None for line in summary.lines)
    columns = (
        Column("Model", "Quantizer and nominal bits per weight; below, everything else that is set", numeric=False),
        Column("Accuracy", "Share of right answers (box: IoU of at least 0.5)", better="high"),
        Column("Δ unquantized", "Accuracy less that of the unquantized model, paired by image", better="high"),
        Column("ECE", "Expected calibration error, 15 bins", better="low"),
        Column("AURC", "Area under the risk-coverage curve", better="low"),
        Column("C@1%", "Largest share answered at a risk of at most 1 %", better="high"),
        Column("C@5%", "Largest share answered at a risk of at most 5 %", better="high"),
        Column(
            "Φ1", "Effective reliability, a wrong answer costing 1; threshold from held-out clean images", better="high"
        ),
        Column("No box", "Share of answers without a box; they count as wrong", better="low"),
        Column("Bits/w", "Bits per quantized weight, scales and zero points counted", better="low"),
        Column("MB", "All weights and buffers of the model, in 10⁶ bytes", better="low"),
        *(_CACHE_COLUMNS if caches else ()),
        Column("Tokens/s", "Generated tokens per second on the machine of the run", better="high"),
        Column("n", "Answers, and below them images; intervals are over images"),
        Column("Task", "Dataset and condition; a shifted value is the mean over all shifted tasks", numeric=False),
    )
    lines = [line for scope in summary.scopes for name in scope.conditions for line in scope.under(name)]
    lines.sort(key=lambda line: -line.group.of("accuracy"))
    return ReportTable(
        "leader",
        "All configurations",
        columns,
        tables.rows_of(
            [_leading(line, titles(summary)[line.config.model, line.family], summary, caches=caches) for line in lines]
        ),
        tuple(_attributes(line, titles(summary)[line.config.model, line.family]) for line in lines),
    )


def titles(summary: Summary) -> dict[tuple[str, object], str]:
    """Return model and dataset → title."""
    return {(scope.model, scope.family): scope.title for scope in summary.scopes}


def _leading(line: Line, title: str, summary: Summary, *, caches: bool) -> list[TableCell]:
    group, cost = line.group, line.cost
    delta = line.delta
    runs = f" \u00d7 {counted(len(line.runs), 'run')}" if len(line.runs) > 1 else ""
    count = whole(group.records)._replace(note=f"{counted(group.images, 'image')}{runs}")
    limited = " (limited)" if line.limited else ""
    return [
        TableCell(line.config.label, line.config.label, note=summary.details(line.config)),
        number(group.of("accuracy"), group.interval("accuracy")),
        number(delta.value, delta.interval, signed=True) if delta else TableCell(tables.NOTHING, None),
        *(number(group.of(m), group.interval(m)) for m in ("ece", "aurc", "coverage@0.01", "coverage@0.05", "phi@1")),
        number(line.unparsed),
        number(cost.bits_per_weight, digits=2),
        number(None if cost.bytes is None else cost.bytes / 1e6, digits=2 if (cost.bytes or 0) < 1e8 else 0),
        *(_cache_cells(cost) if caches else ()),
        number(cost.tokens_per_second, digits=0),
        count,
        text(title, line.condition + limited),
    ]


def _cache_cells(cost: Cost) -> tuple[TableCell, ...]:
    """Return bits and size of a quantized key-value cache; nothing for a cache as the model has it."""
    return number(cost.kv_bits, digits=2), number(None if cost.kv_bytes is None else cost.kv_bytes / 1e3, digits=1)


def _attributes(line: Line, title: str) -> dict[str, str]:
    return {
        "method": UNQUANTIZED if line.config.dense else line.config.method,
        "bits": "" if line.config.dense or line.config.bits is None else str(line.config.bits),
        "task": f"{title}: {line.condition}",
    }


def front(summary: Summary) -> ReportTable:
    """Return the Pareto front of accuracy, reliability, memory and speed, unless it holds all configurations."""
    rows = [
        (text(scope.title, line.condition), line)
        for scope in summary.scopes
        for condition in scope.conditions
        if len(kept := not_dominated(lines := scope.under(condition))) < len(lines)
        for line in kept
    ]
    return costs("pareto", "Not beaten in accuracy, AURC, memory and speed at once", "Task", rows, summary)


def costs(name: str, title: str, place: str, rows: Iterable[tuple[TableCell, Line]], summary: Summary) -> ReportTable:
    """Return accuracy and reliability of configurations beside their cost.

    Args:
        name: Name of the table's file.
        title: Title above the table.
        place: Heading of the column that says where a line was measured.
        rows: Text of that column, and the line.
        summary: Summary that the lines come from.
    """
    columns = (
        Column("Model", numeric=False),
        Column(place, numeric=False),
        Column("Accuracy", better="high"),
        Column("AURC", better="low"),
        Column("MB", better="low"),
        Column("Tokens/s", better="high"),
    )
    cells = [
        [
            TableCell(line.config.label, line.config.label, note=summary.details(line.config)),
            where,
            *(number(line.group.of(m), line.group.interval(m)) for m in ("accuracy", "aurc")),
            number(None if line.cost.bytes is None else line.cost.bytes / 1e6, digits=2),
            number(line.cost.tokens_per_second, digits=0),
        ]
        for where, line in rows
    ]
    return ReportTable(name, title, columns, tables.rows_of(cells))


def not_dominated(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that no other line dominates: equal or better in everything and better in something.

    An objective with a missing value in any line is left out of the comparison for all.
    """
    points = [objectives(line) for line in lines]
    used = [k for k in range(4) if all(not math.isnan(point[k]) for point in points)]
    kept = []
    for line, point in zip(lines, points, strict=True):
        mine = [point[k] for k in used]
        others = [[other[k] for k in used] for other in points]
        if not any(all(a <= b for a, b in zip(o, mine, strict=True)) and o != mine for o in others):
            kept.append(line)
    return sorted(kept, key=lambda line: -line.group.of("accuracy"))


def objectives(line: Line) -> tuple[float, ...]:
    """Return the objectives of a line: errors, bytes, negative tokens per second; low is better, NaN if unknown."""
    cost = line.cost
    values = [sign * line.group.of(metric) for metric, sign in _OBJECTIVES]
    values.append(math.nan if cost.bytes is None else cost.bytes)
    values.append(math.nan if cost.tokens_per_second is None else -cost.tokens_per_second)
    return tuple(values)


def flips(summary: Summary) -> ReportTable:
    """Return flipped answers against the unquantized model, largest net loss first."""
    columns = (
        Column("Model", numeric=False),
        Column("Task", numeric=False),
        Column("Answers", "Answers compared, over tasks and runs"),
        Column("Right → wrong", "Right without quantization, wrong here", better="low"),
        Column("Wrong → right", "Wrong without quantization, right here", better="high"),
        Column("Changed", "Share of answers that changed sides", better="low"),
        Column("Δ accuracy", "Accuracy less that of the unquantized model, paired by image", better="high"),
    )
    found = [
        (scope.title, line)
        for scope in summary.scopes
        for name in scope.conditions
        for line in scope.under(name)
        if line.flips is not None
    ]
    found.sort(key=lambda pair: _changed(pair[1]), reverse=True)
    rows = tables.rows_of([_flipped(line, title, summary) for title, line in found])
    return ReportTable("flips", "Answers that changed sides against the unquantized model", columns, rows)


def _changed(line: Line) -> float:
    return (line.flips.lost + line.flips.won) / line.flips.records if line.flips else 0.0


def _flipped(line: Line, title: str, summary: Summary) -> list[TableCell]:
    if line.flips is None:
        raise ValueError(f"expected flips of {line.config.label}, got none")
    lost, won, records = line.flips
    delta = line.delta
    return [
        TableCell(line.config.label, line.config.label, note=summary.details(line.config)),
        text(title, line.condition),
        whole(records),
        whole(lost),
        whole(won),
        number(_changed(line)),
        number(delta.value, delta.interval, signed=True) if delta else TableCell(tables.NOTHING, None),
    ]


def unparsed(summary: Summary) -> ReportTable:
    """Return tasks in which some answers held no box or no confidence; empty where all did."""
    columns = (
        Column("Model", numeric=False),
        Column("Task", numeric=False),
        Column("Answers"),
        Column("No box", "Answers without a box: they count as wrong", better="low"),
        Column("No confidence", "Answers without a confidence: left out of calibration", better="low"),
    )
    rows = [
        [
            _of_run(run, summary),
            text(task.task),
            whole(task.records),
            whole(task.unparsed),
            whole(task.unsure),
        ]
        for run in summary.runs
        for task in run.measured.tasks.values()
        if task.unparsed or task.unsure
    ]
    rows.sort(key=lambda row: -float(row[3].value or 0))
    return ReportTable("unparsed", "Answers without a box or without a confidence", columns, tables.rows_of(rows))


_REJECTION = MappingProxyType(
    {
        "rejection_auroc": Column(
            "AUROC",
            "Chance that an expression that matches something gets more confidence than one that does not",
            better="high",
        ),
        "rejection_fpr@0.95": Column(
            "FPR@95",
            "Share of expressions that match nothing, at a threshold that accepts 95 % of the others",
            better="low",
        ),
        "confidence_falls": Column(
            "Falls",
            "Share of pairs in which the changed expression gets less confidence than the true one",
            better="high",
        ),
        "box_rate_true": Column("Box if true", "Share of expressions that match something answered with a box"),
        "box_rate_changed": Column("Box if changed", "Share of changed expressions answered with a box", better="low"),
        "box_rate_no_target": Column(
            "Box if absent", "Share of expressions that match nothing answered with a box", better="low"
        ),
    }
)


def rejection(summary: Summary) -> ReportTable:
    """Return the metrics of rejection tasks, run by run; empty where there are none."""
    found = [
        (run, task, {number.metric: number for number in run.rejection if number.task == task})
        for run in summary.runs
        for task in dict.fromkeys(number.task for number in run.rejection)
    ]
    present = [metric for metric in _REJECTION if any(metric in numbers for _, _, numbers in found)]
    columns = (
        Column("Model", numeric=False),
        Column("Task", numeric=False),
        *(_REJECTION[metric] for metric in present),
        Column("n", "Answers, and below them images; intervals are over images"),
    )
    rows = [
        [
            _of_run(run, summary),
            text(task),
            *(_of_number(numbers.get(metric)) for metric in present),
            _count(numbers.values()),
        ]
        for run, task, numbers in found
    ]
    return ReportTable("rejection", "Expressions that match nothing", columns, tables.rows_of(rows))


def _of_number(found: MetricValue | None) -> TableCell:
    return TableCell(tables.NOTHING, None) if found is None else number(found.value, Interval(found.low, found.high))


def _count(numbers: Iterable[MetricValue]) -> TableCell:
    # Numbers of one kind of expression are over its answers alone.
    most = max(numbers, key=lambda one: one.records)
    return whole(most.records)._replace(note=counted(most.images, "image"))


def _of_run(run: ReportedRun, summary: Summary) -> TableCell:
    config = run.axes.config
    return TableCell(config.label, config.label, note=_seeded(summary.details(config), run.axes.seed))


def _seeded(details: str, seed: int | None) -> str:
    return ", ".join(part for part in (details, "" if seed is None else f"seed {seed}") if part)


def runs(summary: Summary) -> ReportTable:
    """Return every run with its place and command."""
    columns = (
        Column("Model", numeric=False),
        Column("Arguments", numeric=False),
        Column("Tasks"),
        Column("Answers"),
        Column("Limit", "Documents per task that the run was limited to, or the share of them"),
        Column("Quantizing s", "Loading, calibration and quantization together"),
        Column("Date", f"In the time zone of lmms-eval's --timezone, by default {DEFAULT_ZONE}", numeric=False),
        Column("File", numeric=False),
    )
    rows = [
        [
            text(run.model, run.axes.cell),
            text(run.model_args),
            whole(len(run.tasks)),
            whole(run.answers),
            _limit(run.limit),
            number(run.cost.seconds_to_quantize, digits=0),
            text(run.date),
            text(run.file.name if run.file.parent == run.axes.folder else str(run.file.relative_to(run.axes.folder))),
        ]
        for run in summary.runs
    ]
    return ReportTable("runs", "All runs", columns, tables.rows_of(rows))


def _limit(limit: float | None) -> TableCell:
    if limit is None:
        return TableCell("all", None)
    return whole(int(limit)) if limit >= 1 else TableCell(f"{100 * limit:g} %", limit)


def meanings(tables_shown: Iterable[ReportTable]) -> dict[str, str]:
    """Return heading → meaning for all tables, since tooltips must be readable on paper, too."""
    found: dict[str, str] = {}
    for shown in tables_shown:
        for column in shown.columns:
            if column.meaning:
                found.setdefault(column.title, column.meaning)
    return found


def every(summary: Summary) -> list[ReportTable]:
    """Return all tables, for files."""
    found = (leader(summary), front(summary), flips(summary), rejection(summary), unparsed(summary), runs(summary))
    return [table for table in found if table.rows]
