"""Environment variables of this package.

Those that name local copies of datasets are `PREFIX` and the dataset's name: see `lmms_plugin.tasks.sources.origins`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

PREFIX = "LMMS_PLUGIN_"

CACHE = f"{PREFIX}CACHE"
"""Folder of unfinished calibrations, converted checkpoints and measured runs; if set to an empty text, none is kept."""

API_KEY = f"{PREFIX}API_KEY"
"""Key of a server that `quant_served` asks, unless its arguments name another variable; never shown."""

LENT_SERVER = f"{PREFIX}LENT_SERVER"
"""File about a server that a study has started for several of its runs."""

IMAGES = f"{PREFIX}IMAGES"
"""Images that grounding tasks ask about, `seed:start:stop`: see `lmms_plugin.utils.image_slices`."""

OF_NO_DATASET = frozenset((CACHE, API_KEY, LENT_SERVER, IMAGES))
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


def cache_folder(kind: str) -> Path | None:
    """Return the folder of what is kept of one kind: below `$LMMS_PLUGIN_CACHE`, or beside the Hugging Face cache.

    None when the variable is empty.

    Raises:
        ValueError: The variable names the home folder of a user who has none here.
    """
    named = folder(CACHE)
    if named is not None:
        return named / kind
    if CACHE in os.environ:
        return None
    # Imported late: this module is imported where no hub is.
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "lmms_plugin" / kind
