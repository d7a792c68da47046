"""Source of RefCOCO+: the hub, or a local copy that `LMMS_PLUGIN_REFCOCOPLUS` names.

A task's YAML names `DATASET`, which reads the environment when the task is loaded.
"""

import os
from typing import Any

from lmms_plugin.utils.copies import AbsentSplitError, files_of, local_folder

HUB_ID = "lmms-lab-encoder/RefCOCOplus"
VARIABLE = "LMMS_PLUGIN_REFCOCOPLUS"
SPLITS = ("val", "testA", "testB")
HINT = (
    f"To use a local copy, set {VARIABLE} to a folder of parquet files in RefCOCO+'s schema, named by split "
    "(testA*.parquet); to try the package without any download, run --tasks shapes_rec with pretrained=demo."
)


def source() -> str:
    """Return the dataset's name for messages: the hub's, or the variable and the folder it names."""
    local = os.environ.get(VARIABLE)
    return f"{VARIABLE}={local}" if local else HUB_ID


def local_files() -> dict[str, list[str]]:
    """Return the Parquet files of the local copy by split: `{split: [paths]}`; empty without a local copy.

    Files at any depth are assigned to splits by their names, as `copies.files_of` does.

    Raises:
        DatasetError: The folder does not exist, holds no split of RefCOCO+, or one of them in part or twice.
    """
    folder = local_folder(VARIABLE, HINT)
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.parquet"))
    found = {split: paths for split in SPLITS if (paths := files_of(files, split))}
    if not found:
        names = ", ".join(f.name for f in files[:5]) or "no parquet file"
        raise AbsentSplitError(f"{VARIABLE}={folder}: expected files such as testA.parquet, found {names}. {HINT}")
    return found


class RefCocoPlus:
    """RefCOCO+ as a task's YAML names it, with all splits; a `DataSource`."""

    def load_arguments(self) -> tuple[str, dict[str, Any]]:
        """Return path and keyword arguments for `datasets.load_dataset`.

        Raises:
            DatasetError: As `local_files`.
        """
        local = os.environ.get(VARIABLE)
        return ("parquet", {"data_files": local_files()}) if local else (HUB_ID, {})


DATASET = RefCocoPlus()
