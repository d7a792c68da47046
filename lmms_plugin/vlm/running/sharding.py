"""With several processes, the questions about one image go to one of them.

lmms-eval 0.7 deals documents round robin (`lmms_eval.utils.create_iterator`: every n-th), which scatters the questions
about an image over all processes, each of which would encode it again. Here documents that know their images are dealt
image by image instead. Documents keep their index, so that logs and response caches do not depend on how many processes
there were; nor do results, up to the last digit of standard errors and the order of samples: lmms-eval puts the
samples of one process behind those of another, and adds up in that order.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import groupby
from typing import Any

_MARK = "_lmms_plugin"
_EXPECTED = ["raw_iterator", "rank", "world_size", "limit", "offset"]


def deal(images: Sequence[Any], processes: int) -> list[list[int]]:
    """Part documents among processes, image by image, the largest first and always to the one with the least.

    Args:
        images: of each document its image's key.
        processes: number of processes.

    Returns:
        For each process the indices of its documents, ascending. Shares differ by at most the number of documents of
        the image with the most.
    """
    order = sorted(range(len(images)), key=lambda i: images[i])
    groups = [list(members) for _, members in groupby(order, key=lambda i: images[i])]
    shares: list[list[int]] = [[] for _ in range(processes)]
    for members in sorted(groups, key=lambda members: (-len(members), members)):
        min(shares, key=len).extend(members)
    return [sorted(share) for share in shares]


def deal_by_image() -> None:
    """Teach lmms-eval to deal documents by image; does nothing the second time.

    If its function is not the one expected, warns and leaves everything as it is: answers stay the same, only slower.
    """
    from lmms_eval import utils

    found = list(inspect.signature(utils.create_iterator).parameters)
    if getattr(utils.create_iterator, _MARK, False):
        return
    if found != _EXPECTED:
        from loguru import logger

        logger.warning(
            f"lmms-eval's create_iterator takes {found}, expected {_EXPECTED}: with several processes, questions about "
            "one image will be spread over them and take longer."
        )
        return
    by_image = _by_image(utils.create_iterator)
    # The evaluator takes the function by name when it is imported, which may have been earlier.
    for module in (utils, sys.modules.get("lmms_eval.evaluator")):
        if hasattr(module, "create_iterator"):
            module.create_iterator = by_image  # type: ignore[union-attr]


def _by_image(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_iterator(
        raw_iterator: Any, rank: int, world_size: int, limit: int | None = None, offset: int = 0
    ) -> Iterator[Any]:
        documents = _documents(raw_iterator) if int(world_size) > 1 else None
        if documents is None:
            rest: Iterator[Any] = original(raw_iterator, rank, world_size, limit, offset)
            return rest
        # For its checks of limit and offset.
        original(iter(()), rank, world_size, limit, offset)
        start = int(offset or 0)
        stop = len(documents) if limit is None else min(len(documents), start + int(limit))
        share = deal([documents.image_key(i) for i in range(start, stop)], int(world_size))[int(rank)]
        return ((start + i, documents[start + i]) for i in share)

    setattr(create_iterator, _MARK, True)
    return create_iterator


def _documents(numbered: Any) -> Any:
    """Return the documents behind `enumerate(documents)`, if they know their images."""
    if not isinstance(numbered, enumerate):
        return None
    made_of: Any = numbered.__reduce__()
    _, (iterator, start) = made_of
    documents = getattr(iterator, "documents", None)
    return documents if start == 0 and hasattr(documents, "image_key") else None
