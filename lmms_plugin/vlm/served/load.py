"""Many requests at once: as many as the server takes, those about one image together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

Unit = TypeVar("Unit")
Item = TypeVar("Item")
Result = TypeVar("Result")
_CALM = 1.0
"""Seconds within which a server that is busy counts once: requests in flight are refused together."""


@dataclass
class Gate:
    """How many requests may be in flight: half as many when the server is busy, one more for each round that goes well.

    Attributes:
        most: Maximum number of requests in flight.
        lowest: Smallest number that the maximum was lowered to.
    """

    most: int
    lowest: int = field(init=False)
    _limit: float = field(init=False)
    _halved: float = field(default=float("-inf"), init=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self._limit = float(self.most)
        self.lowest = self.most

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return max(1, int(self._limit))

    def busy(self) -> None:
        """Note that the server has too much to do."""
        with self._lock:
            now = time.monotonic()
            if now - self._halved >= _CALM:
                self._halved = now
                self._limit = max(1.0, self._limit / 2)
                self.lowest = min(self.lowest, self.limit)

    def answered(self) -> None:
        """Note that a request went well."""
        with self._lock:
            self._limit = min(float(self.most), self._limit + 1 / self._limit)


@dataclass
class Flight(Generic[Unit, Item, Result]):
    """Prepares units of items on background threads and asks for their items, unit by unit.

    Attributes:
        prepare: Function that reads and encodes the items of a unit.
        ask: Function that gets the result of an item.
        gate: Limit of the items that are asked for at once.
        readers: Number of threads that prepare.
        end: Function called when nothing more is wanted, so that requests in flight end.
        first_alone: Whether the others of a unit wait for the result of its first item.
    """

    prepare: Callable[[Unit], Sequence[Item]]
    ask: Callable[[Item], Result]
    gate: Gate
    readers: int
    end: Callable[[], None]
    first_alone: bool = True

    def results(self, units: Iterable[Unit]) -> Generator[tuple[Item, Result]]:
        """Yield every item with its result, in the order in which they are done.

        A bounded number of units is held at a time: those being prepared, and those that are asked for.

        Raises:
            Exception: what `prepare` or `ask` raised first.
        """
        source = iter(units)
        done: SimpleQueue[Future[Any]] = SimpleQueue()
        preparing: set[Future[Any]] = set()
        asked: dict[Future[Any], tuple[Item, Sequence[Item]]] = {}
        ready: deque[tuple[Item, Sequence[Item]]] = deque()
        exhausted = False
        reading = ThreadPoolExecutor(self.readers, thread_name_prefix="lmms-plugin-read")
        asking = ThreadPoolExecutor(self.gate.most, thread_name_prefix="lmms-plugin-ask")
        try:
            while True:
                while not exhausted and len(preparing) <= self.readers and len(ready) <= self.gate.most:
                    unit = next(source, None)
                    if unit is None:
                        exhausted = True
                        break
                    preparing.add(_submitted(reading, self.prepare, unit, done))
                while ready and len(asked) < self.gate.limit:
                    item, rest = ready.popleft()
                    asked[_submitted(asking, self.ask, item, done)] = (item, rest)
                if not preparing and not asked:
                    return
                future = done.get()
                if future in preparing:
                    preparing.remove(future)
                    items = future.result()
                    ready.extend(self._led(items))
                    continue
                item, rest = asked.pop(future)
                result = future.result()
                self.gate.answered()
                # Before other images: the server still holds this one.
                ready.extendleft((one, ()) for one in reversed(rest))
                yield item, result
        finally:
            if preparing or asked:
                self.end()
            reading.shutdown(wait=True, cancel_futures=True)
            # A request that is under way cannot be called back; nobody waits for its answer.
            asking.shutdown(wait=False, cancel_futures=True)

    def _led(self, items: Sequence[Item]) -> list[tuple[Item, Sequence[Item]]]:
        """Items that are asked for next, each with those that wait for it."""
        if self.first_alone:
            return [(items[0], items[1:])] if items else []
        return [(item, ()) for item in items]


def _submitted(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], item: Any, done: SimpleQueue[Future[Any]]
) -> Future[Any]:
    future = pool.submit(work, item)
    future.add_done_callback(done.put)
    return future
