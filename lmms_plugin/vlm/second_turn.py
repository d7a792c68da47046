"""Second turn, in which a model is asked for its confidence in its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.protocol.response import Response
from lmms_plugin.vlm.contracts.requests import Job


def second_turn(job: Job, answer: Response, dialect: Dialect) -> Job:
    """Return a job that continues a conversation: the question, the answer, and a question for the model's confidence.

    It is answered greedily, with the same length limit as the first. The reasoning of an answer is left out, as chat
    templates do with all but the last turn.

    Args:
        job: Job of the answer.
        answer: Answer, whose reasoning, if there is any, came to its end.
        dialect: Dialect of the model.
    """
    settings = replace(job.settings, sampling=None, until=())
    return Job(partial(_messages, job, answer.parts.said_text, dialect.confidence_prompt), job.request, settings)


def _messages(job: Job, said: str, question: str) -> list[Mapping[str, Any]]:
    return [
        *job.messages(),
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
        {"role": "user", "content": [{"type": "text", "text": question}]},
    ]
