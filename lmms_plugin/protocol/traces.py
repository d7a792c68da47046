"""Trace of an answer: which tokens a model read and wrote, in a form short enough to travel with every answer.

Two engines that are to give the same answers must read the same prompt. Its ids are long, since an image takes hundreds
of them; number and digest tell whether two prompts are equal, and the ids themselves are kept only on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lmms_plugin.utils import hashing

_DIGITS = 12
"""Hexadecimal digits of a digest, 48 bits: one in 10¹⁴ pairs of different prompts has equal ones."""


class Trace(NamedTuple):
    """What a model read and wrote, as far as its engine tells.

    Attributes:
        tokens: Number of tokens of the prompt, those of images included.
        image_tokens: Number of those that stand for images; None if unknown.
        digest: Digest of the prompt's ids; "" where only their number is known.
        written: Digest of the ids of all generated tokens; "" if unknown.
        ids: Ids of the prompt; () unless they are kept.
    """

    tokens: int
    image_tokens: int | None = None
    digest: str = ""
    written: str = ""
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids: Sequence[int], image_token: int | None, written: Sequence[int] = ()) -> Trace:
        """Return the trace of a prompt and of the answer to it.

        Args:
            ids: Ids of the prompt.
            image_token: Id of the token that stands for a part of an image; None if unknown.
            written: Ids of all generated tokens; () if unknown.
        """
        images = None if image_token is None else sum(index == image_token for index in ids)
        return cls(len(ids), images, digest_of(ids), digest_of(written) if written else "", tuple(ids))

    @classmethod
    def read(cls, value: Any) -> Trace:
        """Read what `written_out` returns.

        Raises:
            ValueError: It is something else.
        """
        tokens, image_tokens, digest, written, *ids = value
        numbers = [tokens, *([] if image_tokens is None else [image_tokens]), *ids]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise ValueError(f"expected numbers of tokens and their ids, got {value!r:.100}")
        if not (isinstance(digest, str) and isinstance(written, str)):
            raise ValueError(f"expected digests of tokens, got {value!r:.100}")
        return cls(tokens, image_tokens, digest, written, tuple(ids))

    def written_out(self) -> list[Any]:
        """Return the trace as a list for JSON, ids last."""
        return [*self[:4], *self.ids]

    def without_ids(self) -> Trace:
        """Return the trace without the prompt's ids."""
        return self._replace(ids=())


def digest_of(ids: Sequence[int]) -> str:
    """Return the digest of token ids."""
    return short(",".join(map(str, ids)))


def short(text: str) -> str:
    """Return a short digest of a text."""
    return hashing.of_bytes(text.encode("utf-8", "surrogatepass"))[:_DIGITS]
