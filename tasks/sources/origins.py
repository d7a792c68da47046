"""Where a dataset comes from: the hub, or a local copy that an environment variable names."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lmms_plugin.utils.copies import AbsentSplitError, DatasetError, files_of, local_folder
from lmms_plugin.utils.variables import PREFIX


@dataclass(frozen=True)
class DatasetOrigin:
    """One split of a dataset.

    Attributes:
        name: in tasks, logs and the environment variable.
        title: in messages to the user.
        hub_id: repository on the hub; None if there is none that `datasets` can load.
        split: named so on the hub and in file names of a local copy.
        files: the split's files on the hub; None to let `datasets` find them.
    """

    name: str
    title: str
    hub_id: str | None
    split: str
    files: str | None = "data/{split}-*"

    @property
    def variable(self) -> str:
        """The environment variable that names a local copy."""
        return f"{PREFIX}{self.name.upper()}"

    @property
    def wanted(self) -> str:
        """What a local copy holds, for messages to the user."""
        return f"parquet files named by split ({self.split}*.parquet)"

    @property
    def hint(self) -> str:
        """How to go on without the hub."""
        return f"To use a local copy, set {self.variable} to a folder of {self.wanted}."

    @property
    def made_by(self) -> str:
        """How to make a local copy where the hub has none that can be loaded, for messages to the user."""
        return ""

    def place(self) -> str:
        """The dataset as messages to the user name it."""
        local = os.environ.get(self.variable)
        return f"{self.variable}={local}" if local else self.hub_id or self.title

    def row(self, rows: datasets.Dataset, number: int, name: object = None) -> str:
        """A row as messages to the user name it: dataset, split, number and, where it has one, its own name."""
        split = "" if rows.split is None else f"{rows.split}: "
        return f"{self.place()}: {split}row {number}" + ("" if name is None else f" ({name})")

    def load_arguments(self) -> tuple[str, dict[str, Any]]:
        """Path and keyword arguments for `datasets.load_dataset`, of this split alone.

        Raises:
            DatasetError: the local copy does not exist, lacks the split or holds it in part or twice, or there is no
                other source.
        """
        folder = local_folder(self.variable, self.hint)
        if folder is not None:
            return "parquet", {"data_files": {self.split: self._files(folder)}}
        if self.hub_id is None:
            raise DatasetError(
                f"{self.title}: no copy on the hub can be loaded by `datasets`. {self.hint} {self.made_by}".rstrip()
            )
        if self.files is None:
            return self.hub_id, {}
        # The hub's copies hold other splits that are many times larger; their counts would be missed.
        return self.hub_id, {
            "data_files": {self.split: self.files.format(split=self.split)},
            "verification_mode": "no_checks",
        }

    def load(self) -> datasets.Dataset:
        """The rows.

        Raises:
            DatasetError: the dataset cannot be reached; says how to use a local copy.
        """
        path, arguments = self.load_arguments()
        try:
            return datasets.load_dataset(path, split=self.split, **arguments)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DatasetError(f"cannot load {self.place()}: {reason}. {self.hint}") from error

    def _files(self, folder: Path) -> list[str]:
        files = sorted(folder.rglob("*.parquet"))
        own = files_of(files, self.split)
        if not own:
            names = ", ".join(f.name for f in files[:5]) or "no parquet file"
            raise AbsentSplitError(
                f"{self.variable}={folder}: expected {self.split}*.parquet, found {names}. {self.hint}"
            )
        return own
