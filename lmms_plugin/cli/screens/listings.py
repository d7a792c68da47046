"""What `models`, `tasks`, `doctor` and `inspect` print first."""

from __future__ import annotations

from collections.abc import Sequence

from lmms_plugin.cli.screens.screen import ScreenTable, cut, listing, screen, wrapped
from lmms_plugin.doctor.rows import DiagnosisRow, Status
from lmms_plugin.tasks.registry.catalogue import Listed
from lmms_plugin.utils.messages import counted


def models_screen(found: Sequence[tuple[str, str]]) -> str:
    """Return the models, given as (name, summary)."""
    answer = [f"This package adds {counted(len(found), 'model')} to lmms-eval."]
    lines = [f"{name:24} {summary}" for name, summary in found]
    return listing(answer, lines, "model", "Whole lines: --all; options of each: docs/quantizers.md")


def tasks_screen(found: Sequence[Listed]) -> str:
    """Return the tasks and groups whose names begin with no other one's, and how many begin with theirs."""
    names = [one.name for one in found]
    roots = [one for one in found if not any(one.name.startswith(f"{name}_") for name in names)]
    rows = []
    for one in roots:
        below = sum(name.startswith(f"{one.name}_") for name in names)
        rows.append((one.name, one.kind, f"+ {below}" if below else "", cut(one.summary, 37)))
    answer = [
        f"This package adds {counted(len(found), 'task')} and groups of tasks to lmms-eval, here by the"
        f" {counted(len(roots), 'beginning')} of their names."
    ]
    table = ScreenTable(("name", "kind", "more", "what it is"), rows, "name", texts=(1, 3))
    return screen(answer, [table], (), "Every name: --all; every cell of the shift grids: --cells. docs/tasks.md")


def doctor_screen(rows: Sequence[DiagnosisRow], closing: str) -> str:
    """Return what is wrong, then what is as it should be."""
    by = {status: [row for row in rows if row.status is status] for status in Status}
    failed, warned = by[Status.FAIL], by[Status.WARN]
    can = "Something that a run may need does not work" if failed else "Everything that a run needs works"
    answer = [f"{can}: of {counted(len(rows), 'check')} {len(failed)} failed and {len(warned)} warn."]
    lines = [line for row in (*failed, *warned) for line in wrapped(row.line(), 3)]
    lines += [row.line() for row in by[Status.OK]]
    return listing(
        [*answer, closing], lines, "line", "Whole lines: --all; with remedies: --json. docs/troubleshooting.md"
    )


def report_screen(sentence: str, lines: Sequence[str]) -> str:
    """Return what a quantized model or a GGUF file is: its totals in a sentence, then the lines of its table."""
    whole = [part for line in lines for part in (wrapped(line) if len(line) > len(cut(line)) else [line])]
    return listing(
        [f"This is {sentence.rstrip('.')}."], whole, "line", "The same, uncut: --all; layer by layer: --json"
    )
