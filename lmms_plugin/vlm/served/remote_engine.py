"""The engine of a model behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

from lmms_plugin.protocol.prompts import Prompt, PromptReader, RequestError
from lmms_plugin.protocol.traces import Trace, digest_of
from lmms_plugin.utils import hashing
from lmms_plugin.utils.images import told_apart
from lmms_plugin.vlm.contracts.engine import Answer, ContinuationScore, Generated, Traits
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.contracts.settings import GenerationSettings, Sampling
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.generation.special_tokens import traits_of
from lmms_plugin.vlm.running.scheduling import MOST_READERS, by_image, working_on
from lmms_plugin.vlm.served.asking import Requests
from lmms_plugin.vlm.served.checking import ExpectedPrompt, PromptCheck, counted
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.keeping import KeptAnswers
from lmms_plugin.vlm.served.likelihoods import GivenText, Likelihoods, shown
from lmms_plugin.vlm.served.load import Flight, Gate
from lmms_plugin.vlm.served.sent_images import Resizer, SentImage
from lmms_plugin.vlm.served.tokens import Vocabulary

Item = TypeVar("Item")
Result = TypeVar("Result")


class Question(NamedTuple):
    """One thing to ask the server.

    Attributes:
        job: Number of the job that it belongs to.
        sample: Number of a further answer; None for the answer itself.
        prompt: Prompt as our processor shows it.
        shown: Prompt as the API takes it, images by their names.
        images: Name -> data URL.
        settings: Settings of generation.
        seed: Seed of sampling.
        opened: The tag of a reasoning that the prompt's end opened.
        expected: Tokens that our processor makes of the prompt.
    """

    job: int
    sample: int | None
    prompt: Prompt
    shown: Any
    images: Mapping[str, bytes]
    settings: GenerationSettings
    seed: int
    opened: str
    expected: ExpectedPrompt


@dataclass
class ServedEngine:
    """Asks a server; an `Engine`.

    Attributes:
        client: Client of the server.
        asking: Writer of requests.
        vocabulary: Vocabulary of the checkpoint.
        chat: Processor of the checkpoint.
        reader: Reader of messages, which makes prompts.
        check: Check of what the server makes of prompts.
        resizer: Resizer of images.
        gate: Limit of the requests in flight.
        token_ids: Whether ids of an answer's tokens come without log-probabilities.
        digits: Whether alternatives of digits come.
        seed: Seed of the run.
        samples: Further answers per prompt that wants confidence.
        sample_temperature: Temperature at which they are drawn.
        kept: Answers of an earlier run that was broken off; None to keep none.
        likelihoods: How the server tells likelihoods of given texts; None where it cannot.
        first_alone: Whether the other questions about an image wait until its first one is answered.
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
    likelihoods: Likelihoods | None = None
    first_alone: bool = True

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
        flight: Flight[list[int], Question, Generated] = self._flight(
            partial(self.questions, jobs, evidence=evidence), partial(self.ask, evidence=evidence)
        )
        arrived: dict[int, dict[int | None, Generated]] = {}
        with closing(flight.results(by_image(jobs))) as results:
            for question, generated in results:
                mine = arrived.setdefault(question.job, {})
                mine[question.sample] = generated
                if len(mine) == 1 + self._further(question.prompt, evidence):
                    yield question.job, self._answer(question, arrived.pop(question.job), evidence)

    def scores(self, jobs: Sequence[Job]) -> Generator[tuple[int, ContinuationScore]]:
        """Yield the index of a job with the score of its request's continuation; see `Engine`.

        Raises:
            RequestError: the server tells no likelihoods of given texts, or not as it should.
        """
        if self.likelihoods is None and jobs:
            raise RequestError(
                f"{jobs[0].request.name}: this server tells no log-probabilities of given texts (multiple choice, "
                "retrieval): of the engines known here vLLM and SGLang do; serve with one of these, or run the task "
                "with a model that is loaded here (quant_none, quant_prequantized, ...)"
            )
        flight: Flight[list[int], GivenText, ContinuationScore] = self._flight(
            partial(self._given_texts, jobs), self._scored
        )
        with closing(flight.results(by_image(jobs))) as results:
            for given, score in results:
                yield given.job, score

    def _flight(
        self, prepare: Callable[[list[int]], Sequence[Item]], ask: Callable[[Item], Result]
    ) -> Flight[list[int], Item, Result]:
        readers = max(1, min(MOST_READERS, (os.cpu_count() or 1) - 1))
        return Flight(prepare, ask, self.gate, readers, self.client.end, self.first_alone)

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

    def questions(self, jobs: Sequence[Job], unit: Sequence[int], *, evidence: bool = True) -> list[Question]:
        """Read and encode jobs about one image; each different picture is resized and compressed once.

        Args:
            jobs: all of them.
            unit: which of them.
            evidence: as in `answers`.

        Raises:
            RequestError: a document cannot be read, or a task wishes what this server has no field for.
        """
        sent: dict[Any, SentImage] = {}
        asked: list[Question] = []
        for index in unit:
            job = jobs[index]
            with working_on(job):
                prompt, images = self._prompt(job, sent)
                asked_for = self.asking.shown(prompt, [image.name for image in images])
                opened = self.chat.opened_by(prompt) if evidence and prompt.wants_confidence else ""
                expected = self.check.expected(prompt)
                seed = job.request.seed(self.seed)
                asked.append(
                    Question(index, None, prompt, asked_for, dict(images), job.settings, seed, opened, expected)
                )
                drawn = replace(job.settings, sampling=Sampling(self.sample_temperature))
                for sample in range(self._further(prompt, evidence)):
                    seed = job.request.seed(self.seed, sample)
                    asked.append(asked[-1]._replace(sample=sample, settings=drawn, seed=seed))
        return asked

    def _given_texts(self, jobs: Sequence[Job], unit: Sequence[int]) -> list[GivenText]:
        sent: dict[Any, SentImage] = {}
        given: list[GivenText] = []
        for index in unit:
            job = jobs[index]
            with working_on(job):
                prompt, images = self._prompt(job, sent)
                names = [image.name for image in images]
                text = shown(self.chat, prompt, job.request.continuation())
                given.append(GivenText(index, prompt, dict(images), names, *text, self.check.expected(prompt)))
        return given

    def _prompt(self, job: Job, sent: dict[Any, SentImage]) -> tuple[Prompt, list[SentImage]]:
        """Read a job's prompt, and encode those of its images that are not among the sent ones."""
        prompt = job.prompt(self.reader)
        self._expect_possible(job, prompt)
        return prompt, [self._sent(image, sent) for image in prompt.images]

    def _sent(self, image: Any, sent: dict[Any, SentImage]) -> SentImage:
        # Questions about one image mostly share the object, too; the caller keeps it alive.
        if id(image) not in sent:
            key = told_apart(image)
            if key not in sent:
                sent[key] = SentImage.of(self.resizer.seen(image))
            sent[id(image)] = sent[key]
        return sent[id(image)]

    def _expect_possible(self, job: Job, prompt: Prompt) -> None:
        if prompt.raw:
            raise RequestError(f"{prompt.name}: a served model is asked by its chat template, and this prompt has none")
        if job.settings.num_beams > 1:
            raise RequestError(f"{prompt.name}: num_beams={job.settings.num_beams}: servers search no beams")
        if unsent := self.asking.unsent(job.settings):
            raise RequestError(f"{prompt.name}: {unsent}: this server knows only OpenAI's fields and has none for it")

    def ask(self, question: Question, *, evidence: bool = True) -> Generated:
        """Get the answer to a question, from the file of an earlier run or from the server.

        Raises:
            RequestError: the server answers not at all, or not as it should.
        """
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

        def answer() -> dict[str, Any]:
            response = self.asking.ask(self.client, body, question.images)
            agrees = self.check.agrees(prompt, question.expected, response)
            trace = self.check.trace(response)
            return {
                "choice": response["choices"][0],
                "written": counted(response, "completion_tokens"),
                "compared": self.check.compares(response),
                "agrees": agrees,
                "trace": None if trace is None else trace.written_out(),
            }

        def read(record: Mapping[str, Any]) -> Generated:
            generated = self.vocabulary.read(
                record["choice"],
                question.settings.until,
                probabilities=wanted,
                digits=digits,
                written=record["written"],
            )
            if not record.get("trace"):
                return generated
            written = digest_of(generated.ids) if generated.ids else ""
            return generated._replace(trace=Trace.read(record["trace"])._replace(written=written))

        return self._kept_or(answer, read, body, prompt)

    def _scored(self, given: GivenText) -> ContinuationScore:
        """Get the score of a given text, from the file of an earlier run or from the server."""
        assert self.likelihoods is not None
        if not given.ids:
            return ContinuationScore((), True)
        likelihoods, body = self.likelihoods, self.likelihoods.request(given)

        def answer() -> dict[str, Any]:
            told = likelihoods.ask(self.client, given, body)
            agrees = self.check.agrees(given.prompt, given.expected, told.read, given.ids)
            compared = self.check.compares(told.read)
            return {"score": told.score, "compared": compared, "agrees": agrees}

        def read(record: Mapping[str, Any]) -> ContinuationScore:
            logprobs, is_greedy = record["score"]
            return ContinuationScore(tuple(logprobs), is_greedy)

        return self._kept_or(answer, read, body, given.prompt)

    def _kept_or(
        self,
        answer: Callable[[], dict[str, Any]],
        read: Callable[[Mapping[str, Any]], Result],
        body: Mapping[str, Any],
        prompt: Prompt,
    ) -> Result:
        """Read what was answered to a body in an earlier run; ask, and keep it, where there is nothing."""
        key = "" if self.kept is None else hashing.of_value(body)
        record = None if self.kept is None else self.kept.get(key)
        fresh = record is None
        try:
            record = record or answer()
            result = read(record)
        except ServerError as error:
            raise RequestError(f"{prompt.name}: {error}") from error
        self.check.note(record["compared"], agrees=record["agrees"])
        if fresh and self.kept is not None:
            self.kept.keep(key, record)
        return result
