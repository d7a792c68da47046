"""Answers of a reference model with their distributions, on disk, for all runs that are compared with it.

Of every token of an answer the whole distribution is needed, 4 bytes for each token of the vocabulary: 2 kB a token for
the demo's 512, 608 kB for Qwen2.5's 151,936. What finds no room is computed by every run: to force a reference through
its own answers takes as many steps as to have it write them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from torch import Tensor

from lmms_plugin.protocol.prompts import Prompt
from lmms_plugin.protocol.response import Alternatives, Token
from lmms_plugin.quant_backends.plans.specs import MOST_SHARED_BYTES
from lmms_plugin.utils import hashing, tensor_files
from lmms_plugin.utils.files import State
from lmms_plugin.vlm.contracts.requests import Job


class KeptAnswer(NamedTuple):
    """Answer of the reference.

    Attributes:
        tokens: Tokens of the answer, cut where the task says.
        ids: Ids of all generated tokens.
        distributions: Log-probabilities at each of these, shape (ids, vocabulary).
        prompt: Digest of what was asked, from `digest_of`.
    """

    tokens: tuple[Token, ...]
    ids: tuple[int, ...]
    distributions: Tensor
    prompt: str


def digest_of(prompt: Prompt) -> str:
    """Return the SHA-256 of all that a model is shown and told: who says which texts and pixels in which order.

    Of a video it is the name, and the state of its file where there is one.
    """
    digest = hashlib.sha256(repr((prompt.raw, prompt.grounding, prompt.log_probabilities)).encode())
    for message in prompt.messages:
        digest.update(repr(("role", message["role"])).encode())
        for part in message["content"]:
            kind = part["type"]
            digest.update(repr((kind, None if kind == "image" else part[kind])).encode())
            if kind == "image":
                digest.update(repr((part[kind].size, part[kind].mode)).encode())
                digest.update(part[kind].tobytes())
            elif kind == "video" and Path(part[kind]).is_file():
                digest.update(repr(State.of(Path(part[kind]))).encode())
    return digest.hexdigest()


@dataclass
class KeptReference:
    """Answers of one reference, one file for each part of the questions that are answered together.

    Attributes:
        folder: Folder of the answers of this reference under these arguments.
        root: Folder of those of all references.
        most_bytes: Bytes that `root` may hold.
    """

    folder: Path
    root: Path
    most_bytes: int = MOST_SHARED_BYTES

    @classmethod
    def of(cls, folder: str | Path, key: Mapping[str, Any]) -> KeptReference:
        """Return the answers of one reference.

        Args:
            folder: Folder of all that runs share.
            key: JSON-ready values on which the answers depend, besides the questions.
        """
        root = Path(folder).expanduser() / "reference"
        return cls(root / hashing.of_value(key)[:32], root)

    def load(self, jobs: Sequence[Job]) -> list[KeptAnswer] | None:
        """Return the answers to some jobs, in their order; None if they are not there or damaged."""
        found = tensor_files.read_with(self._file(jobs))
        if found is None:
            return None
        tensors, about = found
        logger.info(f"shared_folder: {len(jobs)} answers of the reference are taken from {self.folder}")
        return [
            KeptAnswer(tuple(map(_token, one["tokens"])), tuple(one["ids"]), tensors[str(index)], one["prompt"])
            for index, one in enumerate(about)
        ]

    def keep(self, jobs: Sequence[Job], answers: Sequence[KeptAnswer]) -> None:
        """Keep the answers to some jobs, if there is room."""
        size = sum(answer.distributions.numel() * answer.distributions.element_size() for answer in answers)
        if size > tensor_files.room_in(self.root, self.most_bytes, but={self._file(jobs)}):
            logger.info(
                f"shared_folder: no room for {size / 1e6:.0f} MB of the reference's answers in {self.root}; to make "
                "room, delete it when no run uses it"
            )
            return
        about = [{"tokens": answer.tokens, "ids": answer.ids, "prompt": answer.prompt} for answer in answers]
        distributions = {str(index): answer.distributions for index, answer in enumerate(answers)}
        tensor_files.write(self._file(jobs), distributions, about)

    def _file(self, jobs: Sequence[Job]) -> Path:
        asked = [[*job.request.place, job.request.repeat, repr(job.settings)] for job in jobs]
        return self.folder / f"{hashing.of_value(asked)[:32]}{tensor_files.SUFFIX}"


def _token(value: Sequence[Any]) -> Token:
    text, logprob, alternatives = value
    return Token(text, logprob, None if alternatives is None else Alternatives(*alternatives))
