"""The second turn in which a model is asked how sure it is of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.protocol.response import Response
from lmms_plugin.vlm.contracts.requests import Job


def second_turn(job: Job, answer: Response, dialect: Dialect) -> Job:
    """Return a job that continues a conversation: the same question, the answer, and how sure the model is of it.

    It is answered greedily, at the same length as the first. Of an answer with reasoning the latter is left out, as
    chat templates do with all but the last turn.

    Args:
        job: of the answer.
        answer: whose reasoning, if there is some, came to its end.
        dialect: of the model.
    """
    settings = replace(job.settings, sampling=None, until=())
    return Job(partial(_messages, job, answer.parts.said_text, dialect.confidence_prompt), job.request, settings)


def _messages(job: Job, said: str, question: str) -> list[Mapping[str, Any]]:
    return [
        *job.messages(),
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        {"role": "user", "content": [{"type": "text", "text": question}]},
    ]
