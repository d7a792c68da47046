"""Where images stand in a rendered prompt, and what llama.cpp puts around them by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ImagePlace:
    """What is put in the place of an image's placeholder.

    Attributes:
        found: Text of the rendered prompt that is replaced.
        before: Text before the marker, which the processor adds.
        after: Text behind the marker, likewise.
        opened: Text before an image that the server adds by itself.
        closed: Text behind an image, likewise.
    """

    found: str
    before: str = ""
    after: str = ""
    opened: str = ""
    closed: str = ""

    def count(self, text: str) -> int:
        """Return how many images a rendered prompt shows."""
        return text.count(self.found)

    def marked(self, text: str, marker: str) -> str:
        """Return a rendered prompt with the server's marker in the place of every image."""
        return text.replace(self.found, f"{self.before}{marker}{self.after}")


def places(
    text: str, ids: Sequence[int], image: int, decode: Callable[[Sequence[int]], str], special: Collection[int]
) -> Iterator[ImagePlace]:
    """Yield what may stand in an image's place, the likeliest first.

    Which one is right shows the number of tokens that the server counts: for some families it adds the special tokens
    around an image itself, for others it does not.

    Args:
        text: Prompt with one image as the chat template renders it.
        ids: Ids of the same prompt as the processor makes them, image tokens expanded.
        image: Id of an image token.
        decode: Function from ids to their text, special tokens included.
        special: Ids of special tokens.
    """
    run = [place for place, index in enumerate(ids) if index == image]
    if not run or run[-1] - run[0] + 1 != len(run):
        # Tiles with separators, or an image that has no tokens of its own.
        return
    ahead, behind = ids[: run[0]], ids[run[-1] + 1 :]
    before, after = decode(ahead), decode(behind)
    head = _shared(text, before)
    rest = text[len(head) :]
    tail = _shared(rest[::-1], after[::-1])[::-1]
    found = rest[: len(rest) - len(tail)]
    if not found:
        return
    opening, closing = before[len(head) :], after[: len(after) - len(tail)]
    yield ImagePlace(found, opening, closing)
    opened = decode(ahead[-1:]) if ahead and ahead[-1] in special else ""
    closed = decode(behind[:1]) if behind and behind[0] in special else ""
    if not (opened and closed):
        return
    in_opening, in_closing = opening.endswith(opened), closing.startswith(closed)
    yield ImagePlace(
        f"{'' if in_opening else opened}{found}{'' if in_closing else closed}",
        opening.removesuffix(opened) if in_opening else opening,
        closing.removeprefix(closed) if in_closing else closing,
        opened,
        closed,
    )


def _shared(one: str, other: str) -> str:
    """Return the longest text that both begin with."""
    pairs = zip(one, other, strict=False)
    return one[
        : next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
    ]
