"""The engine of a model behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from lmms_plugin.protocol.prompts import Prompt, PromptReader, RequestError
from lmms_plugin.utils import hashing
from lmms_plugin.utils.images import told_apart
from lmms_plugin.vlm.contracts.engine import Answer, ContinuationScore, Generated, Traits
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.contracts.settings import GenerationSettings, Sampling
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.generation.special_tokens import traits_of
from lmms_plugin.vlm.running.scheduling import MOST_READERS, by_image, working_on
from lmms_plugin.vlm.served.asking import Requests
from lmms_plugin.vlm.served.checking import ExpectedPrompt, PromptCheck
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.keeping import KeptAnswers
from lmms_plugin.vlm.served.load import Flight, Gate
from lmms_plugin.vlm.served.sent_images import Resizer, data_url
from lmms_plugin.vlm.served.tokens import Vocabulary


class Question(NamedTuple):
    """One thing to ask the server.

    Attributes:
        job: number of the job that it belongs to.
        sample: number of a further answer; None for the answer itself.
        prompt: as our processor shows it.
        shown: prompt as the API takes it.
        settings: how to generate.
        seed: of sampling.
        opened: the tag of a reasoning that the prompt's end opened.
        expected: what our processor makes of the prompt.
    """

    job: int
    sample: int | None
    prompt: Prompt
    shown: Any
    settings: GenerationSettings
    seed: int
    opened: str
    expected: ExpectedPrompt


@dataclass
class ServedEngine:
    """Asks a server; an `Engine`.

    Attributes:
        client: of the server.
        asking: writes requests.
        vocabulary: of the checkpoint.
        chat: the checkpoint's processor.
        reader: from messages to prompts.
        check: of what the server makes of prompts.
        resizer: of images.
        gate: how much is in flight.
        token_ids: whether ids of an answer's tokens come without log-probabilities.
        digits: whether alternatives of digits come.
        seed: of the run.
        samples: further answers per prompt that wants confidence.
        sample_temperature: at which they are drawn.
        kept: answers of an earlier run that was broken off; None to keep none.
    """

    client: Client
    asking: Requests
    vocabulary: Vocabulary
    chat: Chat
    reader: PromptReader
    check: PromptCheck
    resizer: Resizer
    gate: Gate
    token_ids: bool
    digits: bool
    seed: int = 0
    samples: int = 0
    sample_temperature: float = 1.0
    kept: KeptAnswers | None = None

    @cached_property
    def traits(self) -> Traits:
        """What all its answers have in common."""
        return traits_of(self.vocabulary.tokenizer, self.vocabulary.special, type(self.chat.processor).__name__)

    @property
    def batch_size(self) -> int:
        """Requests in flight together."""
        return self.gate.most

    @property
    def judges(self) -> bool:
        """Whether the server gives log-probabilities."""
        return self.asking.form.listed is not None

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a text takes, nothing added."""
        return len(self.chat.ids(text))

    def answers(self, jobs: Sequence[Job], *, evidence: bool = True) -> Generator[tuple[int, Answer]]:
        """Yield the index of a job with its answer; see `Engine`.

        Raises:
            RequestError: the server answers one not at all, or not as it should; names the document and the server's
                words.
        """
        readers = max(1, min(MOST_READERS, (os.cpu_count() or 1) - 1))
        flight: Flight[list[int], Question, Generated] = Flight(
            partial(self._questions, jobs, evidence),
            partial(self._asked, evidence=evidence),
            self.gate,
            readers,
            self.client.end,
        )
        arrived: dict[int, dict[int | None, Generated]] = {}
        with closing(flight.results(by_image(jobs))) as results:
            for question, generated in results:
                mine = arrived.setdefault(question.job, {})
                mine[question.sample] = generated
                if len(mine) == 1 + self._further(question.prompt, evidence):
                    yield question.job, self._answer(question, arrived.pop(question.job), evidence)

    def scores(self, jobs: Sequence[Job]) -> Generator[tuple[int, ContinuationScore]]:
        """Refuse: likelihoods of given texts are not asked of servers.

        Raises:
            RequestError: there is a job.
        """
        for job in jobs:
            raise RequestError(
                f"{job.request.name}: likelihoods of given texts (multiple choice, retrieval) are not asked of a "
                "server; run this task with a model that is loaded here (quant_none, quant_prequantized, ...)"
            )
        yield from ()

    def _further(self, prompt: Prompt, evidence: bool) -> int:
        return self.samples if evidence and prompt.wants_confidence else 0

    def _answer(self, question: Question, arrived: Mapping[int | None, Generated], evidence: bool) -> Answer:
        further = self._further(question.prompt, evidence)
        return Answer(
            question.prompt,
            arrived[None],
            question.expected.model_size,
            question.opened,
            samples=tuple(arrived[sample] for sample in range(further)) if further else None,
            records_digits=self.digits and self.judges,
        )

    def _questions(self, jobs: Sequence[Job], evidence: bool, unit: Sequence[int]) -> list[Question]:
        """Read and encode jobs about one image; each different picture is resized and compressed once."""
        urls: dict[Any, str] = {}
        asked: list[Question] = []
        for index in unit:
            job = jobs[index]
            with working_on(job):
                prompt = job.prompt(self.reader)
                self._expect_possible(job, prompt)
                shown = self.asking.shown(prompt, [self._url(image, urls) for image in prompt.images])
                opened = self.chat.opened_by(prompt) if evidence and prompt.wants_confidence else ""
                expected = self.check.expected(prompt)
                seed = job.request.seed(self.seed)
                asked.append(Question(index, None, prompt, shown, job.settings, seed, opened, expected))
                drawn = replace(job.settings, sampling=Sampling(self.sample_temperature))
                for sample in range(self._further(prompt, evidence)):
                    seed = job.request.seed(self.seed, sample)
                    asked.append(asked[-1]._replace(sample=sample, settings=drawn, seed=seed))
        return asked

    def _url(self, image: Any, urls: dict[Any, str]) -> str:
        key = told_apart(image)
        if key not in urls:
            urls[key] = data_url(self.resizer.seen(image))
        return urls[key]

    def _expect_possible(self, job: Job, prompt: Prompt) -> None:
        if prompt.raw:
            raise RequestError(f"{prompt.name}: a served model is asked by its chat template, and this prompt has none")
        if job.settings.num_beams > 1:
            raise RequestError(f"{prompt.name}: num_beams={job.settings.num_beams}: servers search no beams")
        if unsent := self.asking.unsent(job.settings):
            raise RequestError(f"{prompt.name}: {unsent}: this server knows only OpenAI's fields and has none for it")

    def _asked(self, question: Question, *, evidence: bool) -> Generated:
        """Get the answer to a question, from the file of an earlier run or from the server."""
        prompt = question.prompt
        wanted = self.judges and evidence and prompt.wants_confidence and question.sample is None
        digits = wanted and self.digits and prompt.grounding is not None and prompt.grounding.digits
        body = self.asking.body(
            question.shown,
            question.settings,
            seed=question.seed,
            probabilities=wanted or not self.token_ids,
            digits=digits,
        )
        # Bodies hold whole images: they are hashed only if answers are kept.
        key = "" if self.kept is None else hashing.of_value(body)
        record = None if self.kept is None else self.kept.get(key)
        try:
            fresh = record is None
            if record is None:
                response = self.asking.ask(self.client, body)
                agrees = self.check.agrees(prompt, question.expected, response)
                compared = self.check.compares(response)
                record = {"choice": response["choices"][0], "compared": compared, "agrees": agrees}
            generated = self.vocabulary.read(
                record["choice"], question.settings.until, probabilities=wanted, digits=digits
            )
        except ServerError as error:
            raise RequestError(f"{prompt.name}: {error}") from error
        self.check.note(record["compared"], agrees=record["agrees"])
        if fresh and self.kept is not None:
            self.kept.keep(key, record)
        return generated
