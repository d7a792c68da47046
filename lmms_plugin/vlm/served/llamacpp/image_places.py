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
    shown: Sequence[int],
    read: Sequence[int],
    image: int,
    decode: Callable[[Sequence[int]], str],
    special: Collection[int],
) -> Iterator[ImagePlace]:
    """Yield what may stand in an image's place, the likeliest first.

    Which one is right shows the number of tokens that the server counts: for some families it adds the special tokens
    around an image itself, for others it does not.

    Args:
        shown: Ids of a prompt with one image as the chat template renders it.
        read: Ids of the same prompt as the model reads it: the processor has put image tokens in, and maybe more.
        image: Id of an image token.
        decode: Function from ids to their text, special tokens included.
        special: Ids of special tokens.
    """
    run = [place for place, index in enumerate(read) if index == image]
    if not run or run[-1] - run[0] + 1 != len(run):
        # Tiles with separators, or an image that has no tokens of its own.
        return
    ahead, behind = list(read[: run[0]]), list(read[run[-1] + 1 :])
    head = _shared(shown, ahead)
    rest = list(shown[head:])
    tail = _shared(rest[::-1], behind[::-1])
    found = rest[: len(rest) - tail]
    if not found:
        return
    before, after = ahead[head:], behind[: len(behind) - tail]
    yield ImagePlace(decode(found), decode(before), decode(after))
    if not (ahead and behind and ahead[-1] in special and behind[0] in special):
        return
    wider = [*([] if before else ahead[-1:]), *found, *([] if after else behind[:1])]
    yield ImagePlace(decode(wider), decode(before[:-1]), decode(after[1:]), decode(ahead[-1:]), decode(behind[:1]))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two sequences have in common from their start."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
