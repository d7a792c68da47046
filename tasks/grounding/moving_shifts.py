"""Document factory of image shifts that move boxes, for generated cells."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moved:
    """Factory of the documents of a moving shift from RefCOCO+-shaped rows, for a task's `process_docs`.

    Attributes:
        name: Name of the shift.
        severity: Severity, 1 to 5.
    """

    name: str
    severity: int

    def __call__(self, rows: Any) -> Any:
        """Return documents in the dataset's order."""
        # Imported late: listing tasks must not wait for the libraries that read datasets.
        from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
        from lmms_plugin.tasks.grounding.moved_documents import MovedDocs

        return MovedDocs(ExpressionDocs(rows), self.name, self.severity)
