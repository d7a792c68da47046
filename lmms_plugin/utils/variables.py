"""Environment variables of this package.

Those that name local copies of datasets are `PREFIX` and the dataset's name: see `lmms_plugin.tasks.sources.origins`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

PREFIX = "LMMS_PLUGIN_"

CACHE = f"{PREFIX}CACHE"
"""The folder of unfinished calibrations; set to nothing, none is kept."""


def folder(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that a variable names, with `~` and `~user` expanded; None where it is not set, or set to nothing.

    Raises:
        ValueError: It begins with the home folder of somebody who has none here.
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
