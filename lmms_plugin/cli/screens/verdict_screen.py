"""What `study analyse` prints first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmms_plugin.cli.screens.screen import listing, wrapped
from lmms_plugin.study.verdicts.conclusions import Conclusion


def verdict_screen(found: Sequence[Conclusion], file: Path) -> str:
    """Return the sentences of an analysis, the most important first.

    Args:
        found: Conclusions, one per model.
        file: File that has all of them with their tables.
    """
    first, *others = [sentence for one in found for sentence in one.sentences]
    lines = [line for sentence in others for line in (*wrapped(sentence), "")]
    rest = f"Findings and tables: --all, or {file.name} in the study's folder"
    return listing([first], lines[:-1], "line", rest)
