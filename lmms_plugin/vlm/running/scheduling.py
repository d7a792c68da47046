"""Scheduling: encoded batches of a run's jobs, prepared on background threads while the model answers earlier ones.

Reading (decoding an image, shifting it) and encoding (the checkpoint's processor) run a bounded number of images ahead.
The content of a batch depends on the jobs and the budget alone, never on the timing of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from lmms_plugin.protocol.prompts import Prompt, PromptReader, RequestError
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.images import told_apart
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.generation.prefix import Encoded, encode_groups
from lmms_plugin.vlm.generation.processor import Batch, Chat, kind
from lmms_plugin.vlm.running.batching import Budget, RequestGroup, pack
from lmms_plugin.vlm.running.pipeline import ahead

Item = TypeVar("Item")
MOST_READERS = 4
BATCHES_AHEAD = 2


class Read(NamedTuple):
    """Prompt of a job.

    Attributes:
        index: Index of the job.
        prompt: Prompt with its images decoded.
        length: Number of tokens, images included.
        shares: Key, equal for prompts that may share a prefix: those of the same images in the same order.
    """

    index: int  # type: ignore[assignment]  # a method of tuples, which nobody calls here
    prompt: Prompt
    length: int
    shares: Hashable


class Prepared(NamedTuple):
    """Batch ready for the model, still on the CPU.

    Attributes:
        groups: Indices of jobs; a group has the same images.
        prompts: Prompts of the jobs, group by group.
        encoded: Encoded prompts, one row each, or `Encoded` where groups are to share their prefix.
    """

    groups: list[list[int]]
    prompts: list[list[Prompt]]
    encoded: Batch | Encoded

    @property
    def members(self) -> list[int]:
        """Return the indices of all jobs."""
        return [index for group in self.groups for index in group]

    @property
    def flat_prompts(self) -> list[Prompt]:
        """Return all prompts, in the order of `members`."""
        return [prompt for group in self.prompts for prompt in group]


@dataclass
class Schedule:
    """Scheduler of the batches of one run.

    Attributes:
        chat: Processor of the checkpoint.
        reader: Reader that converts messages to prompts.
        budget: Limits of a batch; read whenever the next ones are planned.
        sharing: Whether questions about one image share its prefix; read likewise.
        repeated: Whether questions that request confidence are answered several times, so that a single one has a
            prefix to share too.
    """

    chat: Chat
    reader: PromptReader
    budget: Budget
    sharing: Callable[[], bool]
    repeated: bool = False
    _image_tokens: dict[Hashable, int] = field(default_factory=dict)

    def batches(self, jobs: Sequence[Job]) -> Generator[Prepared]:
        """Yield batches that together hold every job once.

        Raises:
            RequestError: A document cannot be read or shown to this model; task and document are named.
        """
        readers = max(1, min(MOST_READERS, (os.cpu_count() or 1) - 1))
        # The processor has threads of its own, and one caller at a time.
        with _pool(readers) as reading, _pool(1) as encoding:
            units = by_image(jobs)
            read = ahead(reading, lambda unit: [self._read(jobs[i], i) for i in unit], units, readers + 1)
            yield from ahead(encoding, self._prepare, self._plan(read), BATCHES_AHEAD)

    def halves(self, prepared: Prepared) -> Iterator[Prepared]:
        """Encode a batch of several jobs again as two: half of the images each, or half of the questions about one."""
        groups, prompts = prepared.groups, prepared.prompts
        if len(groups) == 1:
            groups, prompts = _halved(groups[0]), _halved(prompts[0])
            return map(self._encode, ([group] for group in groups), ([group] for group in prompts))
        return map(self._encode, _halved(groups), _halved(prompts))

    def _prepare(self, groups: Sequence[Sequence[Read]]) -> Prepared:
        return self._encode(
            [[read.index for read in group] for group in groups], [[read.prompt for read in group] for group in groups]
        )

    def _encode(self, groups: list[list[int]], prompts: list[list[Prompt]]) -> Prepared:
        again = self.repeated and self.sharing() and all(_is_repeated(prompt) for group in prompts for prompt in group)
        if again or any(len(group) > 1 for group in groups):
            return Prepared(groups, prompts, encode_groups(self.chat, prompts))
        return Prepared(groups, prompts, self.chat.encode([prompt for group in prompts for prompt in group]))

    def _read(self, job: Job, index: int) -> Read:
        with working_on(job):
            prompt = job.prompt(self.reader)
            shares = (job.settings, kind(prompt), _content(prompt) if _can_share(prompt, job) else index)
            return Read(index, prompt, self.length_of(prompt), shares)

    def length_of(self, prompt: Prompt) -> int:
        """Count tokens; those of images depend on all their sizes, and are found by encoding the first such prompt."""
        text = len(self.chat.ids(self.chat.text_of(prompt)))
        if not prompt.images or prompt.videos:
            return text
        sizes = (prompt.raw, *(image.size for image in prompt.images))
        if sizes not in self._image_tokens:
            self._image_tokens[sizes] = self.chat.encode([prompt]).inputs["input_ids"].shape[1] - text
        return text + self._image_tokens[sizes]

    def _plan(self, read: Iterable[list[Read]]) -> Iterator[list[list[Read]]]:
        """Collect a few batches' worth of images, group jobs about one image, and pack."""
        pending: dict[Hashable, list[Read]] = {}
        for unit in read:
            for one in unit:
                key = one.shares if self.sharing() else (*one.shares[:2], one.index)  # type: ignore[index]
                pending.setdefault(key, []).append(one)
            if len(pending) > 2 * self.budget.limits.groups:
                last = next(reversed(pending))
                # The next request may belong to the last group.
                kept = {last: pending.pop(last)}
                yield from self._packed(pending)
                pending = kept
        yield from self._packed(pending)

    def _packed(self, pending: dict[Hashable, list[Read]]) -> Iterator[list[list[Read]]]:
        by_index = {one.index: one for group in pending.values() for one in group}
        groups = [
            RequestGroup(
                tuple(one.index for one in group),
                tuple(one.length for one in group),
                # Questions about shared images take another path through the model than single ones.
                (*key[:2], len(group) > 1),  # type: ignore[index]
            )
            for key, group in pending.items()
        ]
        for batch in pack(groups, self.budget.limits):
            yield [[by_index[index] for index in group.members] for group in batch]


@contextmanager
def working_on(job: Job) -> Iterator[None]:
    """Name task and document in whatever a task's own code raises, which on a thread says nothing of them.

    Raises:
        RequestError: anything was raised.
    """
    name = job.request.name
    try:
        yield
    except RequestError:
        raise
    except DatasetError as error:
        raise RequestError(f"{name}: {error}") from error
    except Exception as error:
        raise RequestError(f"{name}: {type(error).__name__}: {error}") from error


def by_image(jobs: Sequence[Job]) -> list[list[int]]:
    """Group jobs that the dataset knows to be about one image, in order of first appearance."""
    units: dict[Hashable, list[int]] = {}
    for index, job in enumerate(jobs):
        image = job.request.image
        units.setdefault((job.settings, index if image is None else image), []).append(index)
    return list(units.values())


def _halved(items: list[Item]) -> list[list[Item]]:
    middle = (len(items) + 1) // 2
    return [items[:middle], items[middle:]]


def _can_share(prompt: Prompt, job: Job) -> bool:
    return bool(prompt.images) and not prompt.videos and job.settings.num_beams == 1


def _is_repeated(prompt: Prompt) -> bool:
    return prompt.wants_confidence and bool(prompt.images) and not prompt.videos


def _content(prompt: Prompt) -> tuple[Any, ...]:
    """Return a key that is equal for prompts that show the same pixels."""
    return tuple(map(told_apart, prompt.images))


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="lmms-plugin")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
