"""Engine of a transformers model that is loaded in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.protocol.prompts import Prompt, PromptReader
from lmms_plugin.protocol.traces import Trace
from lmms_plugin.vlm.assembling import read
from lmms_plugin.vlm.contracts.engine import Answer, ContinuationScore, Generated, Traits
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.contracts.settings import Sampling
from lmms_plugin.vlm.generation.decoding import Decoder
from lmms_plugin.vlm.generation.observer import Observer, Wanted
from lmms_plugin.vlm.generation.processor import Batch, Chat
from lmms_plugin.vlm.generation.special_tokens import Special, traits_of
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer
from lmms_plugin.vlm.running.runner import Runner


@dataclass
class LocalEngine:
    """Loaded model that answers batches over shared prefixes; an `Engine`.

    Attributes:
        decoder: Decoder of the model.
        chat: Processor of the model.
        runner: Runner that executes jobs.
        observer: Observer of its hidden states; None where they are not used.
        seed: Seed of the run.
        samples: Number of further answers per prompt that requests confidence.
        sample_temperature: Temperature of their sampling.
    """

    decoder: Decoder
    chat: Chat
    runner: Runner
    observer: Observer | None
    seed: int
    samples: int
    sample_temperature: float

    @classmethod
    def of(
        cls,
        model: Any,
        chat: Chat,
        reader: PromptReader,
        *,
        arguments: ModelArguments,
        wanted: Wanted | None = None,
        cache_quantizer: CacheQuantizer | None = None,
        rank: int = 0,
    ) -> LocalEngine:
        """Set up for a loaded model.

        Args:
            model: Any Hugging Face model with `generate`.
            chat: Processor of the model.
            reader: Reader that converts messages to prompts.
            arguments: Arguments of the model.
            wanted: Requested use of hidden states; None for none.
            cache_quantizer: Maker of quantized caches; None for caches as the model has them.
            rank: Rank of this process.

        Raises:
            ValueError: The model does not generate token by token, or the requested use does not fit it.
        """
        decoder = Decoder.of(
            model, chat.tokenizer, static_cache=arguments.static_cache, cache_quantizer=cache_quantizer
        )
        observer = wanted.observer(arguments.find_checkpoint(), decoder, rank) if wanted else None
        runner = Runner.of(
            decoder,
            chat,
            reader,
            batch_size=arguments.batch_size,
            share_prefix=arguments.share_prefix,
            pooling=observer.pooling if observer else None,
            repeated=arguments.samples > 0,
        )
        return cls(decoder, chat, runner, observer, arguments.seed, arguments.samples, arguments.sample_temperature)

    @cached_property
    def traits(self) -> Traits:
        """Return the properties common to all its answers."""
        special = Special(self.decoder.special, self.decoder.marks)
        return traits_of(self.decoder.tokenizer, special, type(self.chat.processor).__name__)

    @property
    def batch_size(self) -> int:
        """Return the number of images answered together."""
        return self.runner.budget.limits.groups

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens added."""
        return len(self.chat.ids(text))

    def answers(self, jobs: Sequence[Job], *, evidence: bool = True) -> Generator[tuple[int, Answer]]:
        """Yield the index of a job with its answer; see `Engine`.

        Raises:
            ValueError: The learned confidence was trained on an image that is asked about.
        """
        if not evidence:
            yield from self.runner.run(jobs, self._write)
            return
        if self.observer is not None:
            self.observer.expect_unseen(jobs)
        yield from self.runner.run(jobs, self._answer)
        if self.observer is not None:
            self.observer.finish()

    def scores(self, jobs: Sequence[Job]) -> Generator[tuple[int, ContinuationScore]]:
        """Yield the index of a job with the score of its request's continuation; see `Engine`."""
        yield from self.runner.run(jobs, self._score)

    def _write(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[Answer]:
        rows = zip(prompts, self.decoder.generate(batch.inputs, jobs[0].settings), batch.model_sizes, strict=True)
        return [Answer(*row) for row in rows]

    def _answer(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[Answer]:
        cache: Any = batch.inputs.get("past_key_values")
        columns = 0 if cache is None else cache.get_seq_length()
        answers = self._watched(batch, prompts, jobs)
        sampled = self._sampled(batch, prompts, jobs, columns)
        return [replace(answer, samples=samples) for answer, samples in zip(answers, sampled, strict=True)]

    def _watched(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[Answer]:
        """Answer a batch, with the learned confidence of each answer where there is one."""
        # Beams are rows of their own, and their answers have no log-probabilities.
        if self.observer is None or jobs[0].settings.num_beams > 1:
            return self._generated(batch, prompts, jobs)
        with self.observer.pooling.watching(batch.inputs) as found:
            answers = self._generated(batch, prompts, jobs)
        pooled = found[0] if batch.read is None else batch.read.followed_by(found[0])
        learned = self.observer.observe(pooled, prompts, jobs, [self._spoken(answer) for answer in answers])
        return [replace(answer, confidence=one) for answer, one in zip(answers, learned, strict=True)]

    def _generated(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[Answer]:
        seeds = [job.request.seed(self.seed) for job in jobs]
        digits = any(prompt.grounding is not None and prompt.grounding.digits for prompt in prompts)
        generated = self._traced(batch, self.decoder.generate(batch.inputs, jobs[0].settings, seeds, digits=digits))
        opened = [self.chat.opened_by(prompt) if prompt.wants_confidence else "" for prompt in prompts]
        return [Answer(*row) for row in zip(prompts, generated, batch.model_sizes, opened, strict=True)]

    def _traced(self, batch: Batch, generated: Sequence[Generated]) -> list[Generated]:
        """Add the tokens that were read and written."""
        image_token = getattr(self.chat.processor, "image_token_id", None)
        # One copy from the device each, not one per row.
        masks, prompts = batch.inputs["attention_mask"].tolist(), batch.inputs["input_ids"].tolist()
        rows = zip(masks, prompts, generated, strict=True)
        return [
            one._replace(trace=Trace.of(list(compress(ids, mask)), image_token, one.ids)) for mask, ids, one in rows
        ]

    def _spoken(self, answer: Answer) -> Generated:
        """Return the answer without the tokens of its reasoning."""
        if not answer.prompt.wants_confidence:
            return answer.generated
        return answer.generated._replace(tokens=read(answer, self.traits).spoken.tokens)

    def _sampled(
        self, batch: Batch, prompts: list[Prompt], jobs: list[Job], columns: int
    ) -> Sequence[tuple[Generated, ...] | None]:
        """Sample further answers for an answered batch; None for prompts that request none.

        Over a shared prefix of `columns` columns, each sample costs only its decoding; otherwise it reads the image
        again.
        """
        if not self.samples or not any(prompt.wants_confidence for prompt in prompts):
            return [None] * len(prompts)
        settings = replace(jobs[0].settings, sampling=Sampling(self.sample_temperature))
        drawn: list[list[Generated]] = []
        for sample in range(self.samples):
            if columns:
                self.runner.sharing.rewind(batch.inputs, columns)
            seeds = [job.request.seed(self.seed, sample) for job in jobs]
            drawn.append(self.decoder.generate(batch.inputs, settings, seeds))
        return list(zip(*drawn, strict=True))

    def _score(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[ContinuationScore]:
        rows = zip(prompts, batch.inputs["input_ids"][:, -1].tolist(), jobs, strict=True)
        given = [self.chat.continuation_ids(prompt, last, job.request.continuation()) for prompt, last, job in rows]
        return self.decoder.score(batch.inputs, given)
