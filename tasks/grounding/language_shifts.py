"""What makes the documents of language shifts, for a task's YAML and for generated cells to name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmms_plugin.shifts.severities import SEVERITIES


@dataclass(frozen=True)
class Reworded:
    """Makes the documents of a language shift from RefCOCO+-shaped rows, for a task's `process_docs`.

    Attributes:
        name: of the shift.
        severity: 1 to 5.
    """

    name: str
    severity: int

    def __call__(self, rows: Any) -> Any:
        """Documents in the dataset's order."""
        # Listing tasks must not wait for the libraries that read datasets.
        from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
        from lmms_plugin.tasks.grounding.reworded import shifted

        return shifted(ExpressionDocs(rows), self.name, self.severity)


def _five(shift: str) -> Iterator[Reworded]:
    return (Reworded(shift, severity) for severity in SEVERITIES)


# `process_docs` for a task's YAML to name.
keyboard_typos_1, keyboard_typos_2, keyboard_typos_3, keyboard_typos_4, keyboard_typos_5 = _five("keyboard_typos")
swapped_letters_1, swapped_letters_2, swapped_letters_3, swapped_letters_4, swapped_letters_5 = _five("swapped_letters")
dropped_letters_1, dropped_letters_2, dropped_letters_3, dropped_letters_4, dropped_letters_5 = _five("dropped_letters")
casing_1, casing_2, casing_3, casing_4, casing_5 = _five("casing")
spacing_1, spacing_2, spacing_3, spacing_4, spacing_5 = _five("spacing")
fillers_1, fillers_2, fillers_3, fillers_4, fillers_5 = _five("fillers")
dropped_words_1, dropped_words_2, dropped_words_3, dropped_words_4, dropped_words_5 = _five("dropped_words")
reordered_words_1, reordered_words_2, reordered_words_3, reordered_words_4, reordered_words_5 = _five("reordered_words")
synonyms_1, synonyms_2, synonyms_3, synonyms_4, synonyms_5 = _five("synonyms")
paraphrase_1, paraphrase_2, paraphrase_3, paraphrase_4, paraphrase_5 = _five("paraphrase")
