"""Prompts of families without a chat template, each with its source.

Tasks write for chat models: a question, and then "Answer the question using a single word or phrase." A model that was
never taught to follow instructions continues such a text in its own way, so the question is put in the words with which
its authors evaluated it, and a request for a caption becomes the beginning of one. Requests for captions are declared,
too (`CAPTION_REQUESTS`); everything else counts as a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
CAPTION_REQUESTS = frozenset(
    {
        # coco2014_cap_*, coco2017_cap_*, flickr30k_test, nocaps_* of lmms-eval, and this package's own tasks.
        "Provide a one-sentence caption for the provided image.",
        # coco_karpathy_* of lmms-eval.
        "Describe the image briefly.",
    }
)


@dataclass(frozen=True)
class PlainTemplate:
    """Prompt templates of a family.

    Attributes:
        question: Template of a question, with `{question}`.
        caption: Beginning of a caption; the answer is what follows.
        source: Source of the words.
    """

    question: str
    caption: str
    source: str

    def write(self, request: str) -> str:
        """Return the text that the model reads beside its image.

        Args:
            request: Text of a task.
        """
        if request.strip() in CAPTION_REQUESTS:
            return self.caption
        return self.question.format(question=request.removesuffix(SHORT_ANSWER).strip())


_BLIP2 = PlainTemplate(
    question="Question: {question} Short answer:",
    caption="a photo of",
    source="salesforce/LAVIS, lavis/projects/blip2/eval and configs/models/blip2; BLIP-2, arXiv 2301.12597",
)
_INSTRUCTBLIP = PlainTemplate(
    question="Question: {question} Short answer:",
    caption="A short image description.",
    source="InstructBLIP, arXiv 2305.06500, appendix on evaluation prompts",
)

# There is no task for questions: they are passed as they are. A request for a box is its dialect's.
_FLORENCE2 = PlainTemplate(
    question="{question}",
    caption="<CAPTION>",
    source="Florence-2, arXiv 2311.06242; transformers Florence2Processor (tasks)",
)

TEMPLATES: Mapping[str, PlainTemplate] = MappingProxyType(
    {"Blip2Processor": _BLIP2, "InstructBlipProcessor": _INSTRUCTBLIP, "Florence2Processor": _FLORENCE2}
)
"""Every such family by the class of its processor."""


def template_for(processor: Any) -> PlainTemplate | None:
    """Return the prompt templates of a model; None if it uses its chat template, or a task's own words."""
    if getattr(processor, "chat_template", None) is not None:
        return None
    return TEMPLATES.get(type(processor).__name__)
