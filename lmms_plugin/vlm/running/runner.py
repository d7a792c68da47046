"""Runner of jobs: batches over shared prefixes where possible, and smaller ones where memory is short."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import Tensor

from lmms_plugin.protocol.prompts import Prompt, PromptReader
from lmms_plugin.utils.images import told_apart
from lmms_plugin.utils.processes.out_of_memory import OutOfMemory, while_answering
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.generation.decoding import Decoder
from lmms_plugin.vlm.generation.pooling import Pooling
from lmms_plugin.vlm.generation.prefix import VERIFIED_ROWS, Encoded, NotShareable, PrefixSharing, Shared
from lmms_plugin.vlm.generation.processor import Batch, Chat, kind
from lmms_plugin.vlm.generation.self_check import padded_difference, parted_difference
from lmms_plugin.vlm.running.batching import Budget, Limits, in_order
from lmms_plugin.vlm.running.scheduling import Prepared, Schedule

Result = TypeVar("Result")
# From a batch on the model's device, with its prompts and jobs, to one result per row.
Step = Callable[[Batch, list[Prompt], list[Job]], list[Result]]
# Exceptions of a forward pass that is called in a way its model does not support.
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass
class Runner:
    """Runner that takes jobs through a model.

    Attributes:
        decoder: Decoder of the model.
        chat: Processor of the model.
        reader: Reader that converts messages to prompts.
        sharing: Prefix cache for questions about one image.
        budget: Limits of a batch.
        repeated: Whether questions that request confidence are answered several times.
        batched: Kind of prompt with whether several images were compared, and whether batches of it are padded ->
            whether it may be answered in such, once tried.
    """

    decoder: Decoder
    chat: Chat
    reader: PromptReader
    sharing: PrefixSharing
    budget: Budget
    repeated: bool = False
    batched: dict[tuple[tuple[Hashable, bool], bool], bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        chat: Chat,
        reader: PromptReader,
        *,
        batch_size: int | None,
        share_prefix: bool,
        pooling: Pooling | None = None,
        repeated: bool = False,
    ) -> Runner:
        """Set up for a loaded model.

        Args:
            decoder: Decoder of the model.
            chat: Processor of the model.
            reader: Reader that converts messages to prompts.
            batch_size: Number of images per batch; None for as many as fit.
            share_prefix: Whether to share prefixes where possible.
            pooling: Pooling of hidden states of shared prefixes; None if they are not used.
            repeated: Whether questions that request confidence are answered several times.
        """
        device = decoder.model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        sharing = PrefixSharing.of(decoder, wanted=share_prefix, pooling=pooling)
        if share_prefix and sharing.off is not None:
            _say_off(sharing.off)
        return cls(decoder, chat, reader, sharing, Budget.of(batch_size, free), repeated)

    def run(self, jobs: Sequence[Job], step: Step[Result]) -> Generator[tuple[int, Result]]:
        """Yield the index of a job with its result, in the order of completion.

        Raises:
            RequestError: A document cannot be read or shown to this model; it is named.
            OutOfMemory: Even the smallest batch that the user's arguments allow does not fit.
        """
        schedule = Schedule(self.chat, self.reader, self.budget, lambda: self.sharing.off is None, self.repeated)
        with closing(schedule.batches(jobs)) as batches:
            for prepared in batches:
                yield from self._do(prepared, jobs, step, schedule)

    def _do(
        self, prepared: Prepared, jobs: Sequence[Job], step: Step[Result], schedule: Schedule
    ) -> list[tuple[int, Result]]:
        done, fits = None, True
        try:
            done = self._attempt(prepared, jobs, step)
        except NotShareable as reason:
            self._say_once(reason)
        except OutOfMemory:
            shared = isinstance(prepared.encoded, Encoded)
            if len(prepared.members) == 1 or not (shared or self.budget.automatic):
                raise
            fits = False
        if done is not None:
            self.budget.succeeded(len(prepared.groups))
            return done
        # Outside of the handler, so that no traceback keeps the tensors of the failed attempt alive.
        if not fits:
            self._make_room(prepared)
        return [one for half in schedule.halves(prepared) for one in self._do(half, jobs, step, schedule)]

    def _make_room(self, prepared: Prepared) -> None:
        shared = isinstance(prepared.encoded, Encoded) and self.sharing.off is None
        self.budget.failed(len(prepared.groups), shared=shared)
        logger.warning("Out of memory: going on with smaller batches")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _settle_cache(self, prompt: Prompt) -> None:
        """Find out, with the run's first prompt, whether the last token of a prompt may be read apart."""
        quantizer = self.decoder.cache_quantizer
        if quantizer is None or quantizer.settled:
            return
        told: str | None = "its images are encoded while it reads its prompt"
        if quantizer.reads_last_apart:
            try:
                told = parted_difference(self.decoder, self._on_device(self.chat.encode([prompt]).inputs))
            except _REFUSALS as error:
                told = f"{type(error).__name__}: {error}"
            quantizer.reads_last_apart = told is None
        quantizer.settled = True
        if not quantizer.reads_last_apart:
            logger.warning(
                "{} must read a prompt at once ({}): the first token of an answer comes from the keys and values that "
                "it computed, and only the others come from the quantized cache",
                type(self.decoder.model).__name__,
                told,
            )

    def _attempt(self, prepared: Prepared, jobs: Sequence[Job], step: Step[Result]) -> list[tuple[int, Result]]:
        self._settle_cache(prepared.flat_prompts[0])
        if not isinstance(prepared.encoded, Encoded):
            return self._plain(prepared, prepared.encoded, jobs, step)
        shared = self._laid_out(prepared, prepared.encoded, jobs)
        if shared is not None:
            return self._shared(prepared, shared, jobs, step)
        prompts = prepared.flat_prompts
        done: list[tuple[int, Result]] = []
        for part in in_order(prepared.encoded.lengths, self.budget.limits):
            batch = self.chat.encode([prompts[i] for i in part])
            done += self._plain(_some(prepared, part, batch), batch, jobs, step)
        return done

    def _plain(
        self, prepared: Prepared, batch: Batch, jobs: Sequence[Job], step: Step[Result]
    ) -> list[tuple[int, Result]]:
        prompts = prepared.flat_prompts
        if not self._may_batch(prompts, batch):
            parts = _unpadded(batch)
            rows = [self.chat.encode([prompts[i] for i in part]) for part in parts]
            split = [_some(prepared, part, one) for part, one in zip(parts, rows, strict=True)]
            return [one for part, row in zip(split, rows, strict=True) for one in self._plain(part, row, jobs, step)]
        batch = batch._replace(inputs=self._on_device(batch.inputs))
        done = step(batch, prompts, [jobs[i] for i in prepared.members])
        return list(zip(prepared.members, done, strict=True))

    def _may_batch(self, prompts: list[Prompt], batch: Batch) -> bool:
        """Return whether a batch may be answered as it is; the first of each kind is compared with its rows alone.

        One that is padded shows both what padding and what other rows change, one that is not the latter. Whether rows
        take each other's images shows only where there are several.
        """
        # What holds of several images holds of one, and what holds with padding without.
        if len(prompts) == 1 or self.batched.get(((kind(prompts[0]), True), True)):
            return True
        lengths = _lengths(batch)
        ends = _most_unlike(prompts, lengths)
        padded, several = min(lengths) != max(lengths), not _show_the_same(*(prompts[i] for i in ends))
        sort = (kind(prompts[0]), several)
        if self.batched.get((sort, True)):
            return True
        if self.batched.get((sort, False)) is False:
            return False
        if (sort, padded) not in self.batched:
            try:
                alone = [self._on_device(self.chat.encode([prompts[i]]).inputs) for i in ends]
                together = self._on_device(self.chat.encode([prompts[i] for i in ends]).inputs)
                difference = padded_difference(self.decoder, alone, together)
            except OutOfMemory:
                # The batch, which is no smaller, will run out of memory too and be handled there.
                return True
            self.batched[sort, padded] = difference is None
            if difference is not None:
                self._say_apart(difference, padded=padded)
        return self.batched[sort, padded]

    def _say_apart(self, difference: str, *, padded: bool) -> None:
        logger.warning(
            "Answers in a {} are not those that {} gives to each question alone: {}. In this run {} are not answered "
            "together, which is slower.",
            "padded batch" if padded else "batch without padding",
            type(self.decoder.model).__name__,
            difference,
            "questions of different length" if padded else "all questions",
        )

    def _shared(
        self, prepared: Prepared, shared: Shared, jobs: Sequence[Job], step: Step[Result]
    ) -> list[tuple[int, Result]]:
        assert isinstance(prepared.encoded, Encoded)
        sizes, owners = prepared.encoded.batch.model_sizes, shared.owners.tolist()
        members, prompts = prepared.members, prepared.flat_prompts
        settings = jobs[members[0]].settings
        done: list[tuple[int, Result]] = []
        for rows, inputs, read in self.sharing.parts(shared, settings, self.budget.cache_bytes):
            batch = Batch(inputs, [sizes[owners[row]] for row in rows], read)
            results = step(batch, [prompts[row] for row in rows], [jobs[members[row]] for row in rows])
            done += zip([members[row] for row in rows], results, strict=True)
            # Freed for the next part's keys and values.
            del batch, inputs
        return done

    def _laid_out(self, prepared: Prepared, encoded: Encoded, jobs: Sequence[Job]) -> Shared | None:
        """Lay a batch out for sharing; the run's first is compared with unshared answers. None means not to share.

        Raises:
            NotShareable: One of several groups cannot share, or not together with the others.
        """
        if self.sharing.off is not None:
            return None
        settings = jobs[prepared.members[0]].settings
        if len(prepared.groups) > 1 and not self._may_batch([group[0] for group in prepared.prompts], encoded.batch):
            raise NotShareable("those about several images, in one batch, are not answered as each alone")
        try:
            shared = self.sharing.lay_out(encoded, settings)
        except NotShareable as reason:
            if len(prepared.groups) > 1:
                raise
            self._say_once(reason)
            return None
        shared = shared._replace(
            prefix=self._on_device(shared.prefix),
            **self._on_device({"input_ids": shared.input_ids, "attention_mask": shared.attention_mask}),
        )
        if not self.sharing.verified:
            self._verify(prepared, encoded, shared, self.budget.limits)
        return shared if self.sharing.off is None else None

    def _verify(self, prepared: Prepared, encoded: Encoded, shared: Shared, limits: Limits) -> None:
        prompts = prepared.flat_prompts
        parts = in_order(encoded.lengths[:VERIFIED_ROWS], limits)
        batches = [self.chat.encode([prompts[i] for i in part]) for part in parts]
        pairs = zip(parts, batches, strict=True)
        if not all(self._may_batch([prompts[i] for i in part], batch) for part, batch in pairs):
            parts = [range(i, i + 1) for part in parts for i in part]
            batches = [self.chat.encode([prompts[i] for i in part]) for part in parts]
        plain = [batch.inputs for batch in batches]
        one_by_one = False
        try:
            with while_answering(max(map(len, parts))):
                difference = self.sharing.verify(shared, map(self._on_device, plain), self.budget.cache_bytes)
        except NotShareable as reason:
            self.sharing.off = str(reason)
            _say_off(str(reason))
            return
        except OutOfMemory:
            if max(map(len, parts)) == 1:
                raise
            # One image of a batch over shared prefixes is several of an unshared batch.
            one_by_one = True
        except _REFUSALS as error:
            difference = f"the model cannot go on from a given prefix ({type(error).__name__}: {error})"
        if one_by_one:
            self._verify(prepared, encoded, shared, limits._replace(groups=1))
            return
        self.sharing.verified = True
        if difference is not None:
            self.sharing.off = difference
            logger.warning(
                "Answers over a shared encoding of the image are not those of the plain way: {}. In this run every "
                "question gets an encoding of its own, which is slower.",
                difference,
            )

    def _say_once(self, reason: NotShareable) -> None:
        if self.sharing.is_news(str(reason)):
            logger.info("Some questions do not share the encoding of their image: {}", reason)

    def _on_device(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        model = self.decoder.model
        with while_answering(len(inputs["input_ids"])):
            return {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }


def _lengths(batch: Batch) -> list[int]:
    """Return the number of tokens of each row, without padding."""
    lengths: list[int] = batch.inputs["attention_mask"].sum(1).tolist()
    return lengths


def _most_unlike(prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[int]:
    """Return two rows of a batch: of other lengths if there are any, and of other images if there are any."""
    ends = [lengths.index(min(lengths)), lengths.index(max(lengths))]
    if ends[0] == ends[1]:
        ends = [0, len(prompts) - 1]
    if not _show_the_same(*(prompts[i] for i in ends)):
        return ends
    other = next((i for i, one in enumerate(prompts) if not _show_the_same(one, prompts[ends[0]])), None)
    # Of two rows of unequal length, one at least is not as long as a third.
    return ends if other is None else [max(ends, key=lambda i: abs(lengths[i] - lengths[other])), other]


def _show_the_same(one: Prompt, other: Prompt) -> bool:
    """Return whether two prompts show the same pixels."""
    if [id(image) for image in one.images] == [id(image) for image in other.images]:
        return True
    return [told_apart(image) for image in one.images] == [told_apart(image) for image in other.images]


def _unpadded(batch: Batch) -> list[list[int]]:
    """Return the rows of a padded batch by their length, and those of another one each by itself."""
    lengths = _lengths(batch)
    if len(set(lengths)) == 1:
        return [[row] for row in range(len(lengths))]
    return [[row for row, each in enumerate(lengths) if each == length] for length in dict.fromkeys(lengths)]


def _some(prepared: Prepared, part: Sequence[int], batch: Batch) -> Prepared:
    """Return the jobs of a batch with the indices in `part`, each a group of its own, as encoded together."""
    members, prompts = prepared.members, prepared.flat_prompts
    return Prepared([[members[i]] for i in part], [[prompts[i]] for i in part], batch)


def _say_off(reason: str) -> None:
    logger.info("Questions about one image do not share its encoding: {}", reason)
