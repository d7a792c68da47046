"""Work on background threads a bounded number of steps ahead of its consumer, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(pool: Executor, make: Callable[[Item], Made], items: Iterable[Item], depth: int) -> Iterator[Made]:
    """Yield `make(item)` for every item in order, with up to `depth` of them under way or waiting to be taken.

    Items are taken from `items` by the consumer's own thread, so a generator is safe there, and another `ahead` too.

    Raises:
        Exception: what `make` raised, when the consumer comes to that item; what is under way then is cancelled.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    waiting: deque[Future[Made]] = deque()
    source = iter(items)
    try:
        while True:
            while len(waiting) < depth:
                try:
                    waiting.append(pool.submit(make, next(source)))
                except StopIteration:
                    break
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
