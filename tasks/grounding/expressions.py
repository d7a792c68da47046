"""RefCOCO+ rows (one per object) as documents (one per expression), with images decoded on access."""

import datasets

from lmms_plugin.tasks.grounding import strata
from lmms_plugin.tasks.grounding.refcocoplus import HUB_ID
from lmms_plugin.tasks.grounding.referring import ReferringDocs, ReferringSet
from lmms_plugin.tasks.sources.conventions import Convention

REFCOCOPLUS = ReferringSet(
    name="refcocoplus",
    title="RefCOCO+",
    hub_id=HUB_ID,
    split="testA",
    expression="answer",
    box="bbox",
    convention=Convention("xywh"),
    per="expression",
    identity="question_id",
    photograph="file_name",
    strata=strata.REFCOCO,
)
"""Schema of RefCOCO+ and its siblings on the hub: one row per object with all its expressions."""


class ExpressionDocs(ReferringDocs):
    """Documents over rows in RefCOCO+'s schema: row r with k expressions gives k documents.

    `Dataset.select` plus `add_column` would copy every image once per expression. For columns and errors see
    `ReferringDocs`.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        super().__init__(REFCOCOPLUS, rows)
