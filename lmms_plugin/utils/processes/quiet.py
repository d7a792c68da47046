"""What libraries say that belongs in no output of ours: warnings to one another, and whatever they print."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to standard error what anything prints meanwhile, compilers started by libraries included."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def no_bars() -> None:
    """Have libraries draw no progress bars where standard error is no terminal; pipes would hold each of their states.

    Our own bars keep to that by themselves.
    """
    if sys.stderr.isatty():
        return
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    disable_progress_bars()
    datasets.disable_progress_bars()
