"""Environment variables of this package.

Those that name local copies of datasets are `PREFIX` and the dataset's name: see `lmms_plugin.tasks.sources.origins`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

PREFIX = "LMMS_PLUGIN_"

CACHE = f"{PREFIX}CACHE"
"""Folder of unfinished calibrations; if set to an empty text, none is kept."""

API_KEY = f"{PREFIX}API_KEY"
"""Key of a server that `quant_served` asks, unless its arguments name another variable; never shown."""

LENT_SERVER = f"{PREFIX}LENT_SERVER"
"""File about a server that a study has started for several of its runs."""

OF_NO_DATASET = frozenset((CACHE, API_KEY, LENT_SERVER))
"""Variables that name no local copy of a dataset."""


def folder(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the folder that a variable names, with `~` and `~user` expanded; None if it is unset or empty.

    Raises:
        ValueError: The path begins with the home folder of an unknown user.
    """
    value = environment.get(name)
    if not value:
        return None
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{name}={value}: expected a folder, but {value.partition(os.sep)[0]} has no home folder here; write the "
            "path in full"
        ) from error
