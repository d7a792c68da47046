"""Places of checkpoints: a folder, or the Hugging Face hub and its cache."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from lmms_plugin.utils.reading.readable import readable

_TIMEOUT = 5.0
"""Seconds to wait for an answer of the hub; twice that, and the start of lmms-eval, are to stay below 20."""
_REMEDIES = "name a folder that holds the checkpoint, set HF_HOME to a cache that does, or try pretrained=demo"


def find(name: str, argument: str = "pretrained") -> str:
    """Return the folder that a checkpoint's name leads to, else the name as an id on the hub; uses no network.

    Args:
        name: Value of the argument as the user wrote it.
        argument: Name of the argument, for messages.

    Raises:
        FileNotFoundError: The name is written like a path, and no checkpoint is there.
        ValueError: The name is that of a file, or neither of a folder nor possible as an id.
    """
    folder = Path(name).expanduser()
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{argument}: the folder {folder} holds no config.json; expected a checkpoint of transformers"
            )
        return str(folder)
    if os.path.exists(folder):
        raise ValueError(f"{argument}: {folder} is a file; expected the folder of a checkpoint with its config.json")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{argument}: there is no folder {folder}: read as a path, for an id on the hub is owner/name; {_REMEDIES}"
        )
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{argument}: {name!r:.200} is no folder here, and no id on the hub, which is owner/name of letters, "
            f"digits, '-', '_' and '.'; {_REMEDIES}"
        ) from error
    return name


def config_of(path: str, *, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a checkpoint.

    Args:
        path: Folder or id, as `find` returns it.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        ValueError: The configuration is damaged, or `expect_fetchable` refuses the id.
    """
    expect_there(path)
    from transformers import AutoConfig

    with readable(f"{path}: config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def expect_there(path: str) -> None:
    """Refuse an id that cannot be fetched; a folder, as `find` returns it, is accepted.

    Raises:
        ValueError: As `expect_fetchable`.
    """
    if not os.path.isdir(path):
        expect_fetchable(path)


@cache
def expect_fetchable(repository: str) -> None:
    """Refuse an id whose checkpoint is neither on the hub nor in the cache, after one request without a retry.

    Raises:
        ValueError: The checkpoint cannot be fetched; names the reason and the remedy.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    read = f"pretrained: {repository} is no folder here, so it was read as an id on the hub"
    cached = isinstance(try_to_load_from_cache(repository, "config.json"), str)
    if constants.is_offline_mode():
        if cached:
            return
        raise ValueError(
            f"{read}, which HF_HUB_OFFLINE forbids to ask, and the cache {constants.HF_HUB_CACHE} does not hold it; "
            f"unset HF_HUB_OFFLINE, or {_REMEDIES}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise ValueError(
            f"{read}, where it is gated; accept its terms at {constants.ENDPOINT}/{repository}, and log in "
            "(hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{read}, where there is none of this name, or it is private; check how it is written, or log in "
            f"(hf auth login), or {_REMEDIES}"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(f"{read}, where it holds no config.json; expected a checkpoint of transformers") from error
    # Which HTTP client raises its own errors depends on the version of huggingface_hub.
    except Exception as error:
        if cached:
            from loguru import logger

            logger.warning("{} cannot be asked for {}: taken from the cache", constants.ENDPOINT, repository)
            return
        fault = "answers with an error" if isinstance(error, HfHubHTTPError) else "cannot be reached"
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{read}, but {constants.ENDPOINT} {fault} ({said}); {_REMEDIES}") from error
