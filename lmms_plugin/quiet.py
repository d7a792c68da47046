"""Warnings of libraries to one another that nobody who runs an evaluation can do anything about."""

from __future__ import annotations

import logging


class EnumsOfTorchao(logging.Filter):
    """Drops torch's notes that torchao registers two of its enumerations, which torch by now knows by itself.

    Nothing depends on the registration, which torch goes on to make. The notes come while torchao is imported, which
    transformers does of its own accord, and would be printed at the start of every run.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record of ``torch.utils._pytree`` is anything else."""
        kind = record.args[0] if isinstance(record.args, tuple) and record.args else None
        return not (
            isinstance(kind, type)
            and kind.__module__.startswith("torchao.")
            and "is an Enum subclass and is now natively supported" in str(record.msg)
        )


def hush() -> None:
    """Have the filter in place before torchao is imported; torch need not be."""
    logger = logging.getLogger("torch.utils._pytree")
    if not any(isinstance(known, EnumsOfTorchao) for known in logger.filters):
        logger.addFilter(EnumsOfTorchao())
