"""Where the VQA datasets come from: the hub, or a local copy that an environment variable names.

A task's YAML names one as its `dataset_path`; the environment is looked at when the task is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lmms_plugin.tasks.sources.origins import DatasetOrigin

SHORT = "\nAnswer the question using a single word or phrase."
OR_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


@dataclass(frozen=True)
class VqaDataset(DatasetOrigin):
    """A VQA dataset.

    Attributes:
        photographs: where its images come from; datasets of the same photographs share their numbering.
        image_column: the column that tells photographs apart.
        structured: whether an answer is a struct with the field `answer`, or a plain string.
        post_prompt: what follows the question, in the words of lmms-eval's own task.
    """

    photographs: str = "coco"
    image_column: str = "image_id"
    structured: bool = True
    post_prompt: str = SHORT

    @property
    def wanted(self) -> str:
        """What a local copy holds, for messages to the user."""
        return f"{super().wanted}, in the columns that the documentation of lmms_plugin.tasks.vqa.questions lists"

    @property
    def made_by(self) -> str:
        """How to make a local copy where the hub has none that can be loaded, for messages to the user."""
        return "To make one of the published files: python -m lmms_plugin.tasks.sources.official_vqa --help"


VQAV2 = VqaDataset("vqav2", "VQAv2", "lmms-lab-encoder/VQAv2", "validation")
# The hub's copy is a loading script, which `datasets` no longer runs; `lmms_plugin.tasks.sources.official_vqa` makes a
# local copy of the published files.
ADVQA = VqaDataset("advqa", "AdVQA", None, "validation")
VIZWIZ = VqaDataset(
    "vizwiz",
    "VizWiz-VQA",
    "lmms-lab-encoder/VizWiz-VQA",
    "val",
    photographs="vizwiz",
    image_column="question_id",
    structured=False,
    post_prompt=OR_UNANSWERABLE,
)
SOURCES: Mapping[str, VqaDataset] = MappingProxyType({source.name: source for source in (VQAV2, ADVQA, VIZWIZ)})
"""Every VQA dataset by name."""


HINT = (
    "To use local copies, name their folders in "
    + ", ".join(source.variable for source in SOURCES.values())
    + ": parquet files named by split, in the columns that lmms_plugin.tasks.vqa.questions lists."
)
