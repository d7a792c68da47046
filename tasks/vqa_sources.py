"""Where the VQA datasets come from: the hub, or a local copy that an environment variable names.

lmms-eval's YAML refers to `VQAV2_PATH`, `VQAV2_KWARGS` and the like, which are read from the environment when a task is
loaded and not when this module is imported.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets

from lmms_plugin.tasks.images import DatasetError

SHORT = "\nAnswer the question using a single word or phrase."
OR_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


@dataclass(frozen=True)
class Source:
    """A VQA dataset.

    Attributes:
        name: in tasks and logs.
        title: in messages to the user.
        hub_id: repository on the hub; None if there is none that `datasets` can load.
        split: the split with answers, named so on the hub and in file names of a local copy.
        photographs: where its images come from; datasets of the same photographs share their numbering.
        image_column: the column that tells photographs apart.
        structured: whether an answer is a struct with the field `answer`, or a plain string.
        post_prompt: what follows the question, in the words of lmms-eval's own task.
    """

    name: str
    title: str
    hub_id: str | None
    split: str
    photographs: str = "coco"
    image_column: str = "image_id"
    structured: bool = True
    post_prompt: str = SHORT

    @property
    def variable(self) -> str:
        """The environment variable that names a local copy."""
        return f"LMMS_PLUGIN_{self.name.upper()}"

    @property
    def hint(self) -> str:
        """How to go on without the hub."""
        return (
            f"To use a local copy, set {self.variable} to a folder of parquet files named by split "
            f"({self.split}*.parquet), in the columns that the documentation of lmms_plugin.tasks.questions lists."
        )

    def place(self) -> str:
        """The dataset as messages to the user name it."""
        local = os.environ.get(self.variable)
        return f"{self.variable}={local}" if local else self.hub_id or self.title

    def load_arguments(self) -> tuple[str, dict[str, Any]]:
        """Path and keyword arguments for `datasets.load_dataset`, of the split with answers alone.

        Raises:
            DatasetError: the local copy does not exist or lacks the split, or there is no other source.
        """
        local = os.environ.get(self.variable)
        if local:
            return "parquet", {"data_files": {self.split: self._files(Path(local))}}
        if self.hub_id is None:
            raise DatasetError(
                f"{self.title}: no copy on the hub can be loaded by `datasets`. {self.hint} To make one of the "
                "published files: python -m lmms_plugin.tasks.official_vqa --help"
            )
        # The hub's copies hold splits without answers that are many times larger; their counts would be missed.
        return self.hub_id, {
            "data_files": {self.split: f"data/{self.split}-*"},
            "verification_mode": "no_checks",
        }

    def load(self) -> datasets.Dataset:
        """The rows with answers.

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
        if not folder.is_dir():
            raise DatasetError(f"{self.variable}={folder}: there is no such folder. {self.hint}")
        files = sorted(folder.rglob("*.parquet"))
        own = [str(f) for f in files if f.name.startswith((f"{self.split}.", f"{self.split}-", f"{self.split}_"))]
        if not own:
            names = ", ".join(f.name for f in files[:5]) or "no parquet file"
            raise DatasetError(f"{self.variable}={folder}: expected {self.split}*.parquet, found {names}. {self.hint}")
        return own


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        source.name: source
        for source in (
            Source("vqav2", "VQAv2", "lmms-lab-encoder/VQAv2", "validation"),
            # The hub's copy is a loading script, which `datasets` no longer runs; `lmms_plugin.tasks.official_vqa`
            # makes a local copy of the published files.
            Source("advqa", "AdVQA", None, "validation"),
            Source(
                "vizwiz",
                "VizWiz-VQA",
                "lmms-lab-encoder/VizWiz-VQA",
                "val",
                photographs="vizwiz",
                image_column="question_id",
                structured=False,
                post_prompt=OR_UNANSWERABLE,
            ),
        )
    }
)
"""Every VQA dataset by name."""


HINT = (
    "To use local copies, name their folders in "
    + ", ".join(source.variable for source in SOURCES.values())
    + ": parquet files named by split, in the columns that lmms_plugin.tasks.questions lists."
)


def __getattr__(name: str) -> Any:
    dataset, _, wanted = name.partition("_")
    source = SOURCES.get(dataset.lower())
    if source is None or wanted not in ("PATH", "KWARGS"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, arguments = source.load_arguments()
    return path if wanted == "PATH" else arguments
