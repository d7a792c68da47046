"""Generation: lmms-eval's requests become an engine's jobs, and its records become responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tqdm import tqdm

from lmms_plugin.ending import ends_the_command
from lmms_plugin.protocol.prompts import RequestError
from lmms_plugin.protocol.response import ForcedAnswer, Response
from lmms_plugin.vlm.assembling import Assembler, encoded_scores
from lmms_plugin.vlm.contracts.engine import Answer, ContinuationScore, Engine
from lmms_plugin.vlm.contracts.requests import Job, Messages, Request, candidates_of
from lmms_plugin.vlm.contracts.responding import Usage
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.second_turn import second_turn
from lmms_plugin.vlm.trial_questions import told, trial_jobs

Record = TypeVar("Record")
REQUESTS_AT_ONCE = 4
"""Requests whose candidates are listed together: of each there may be thousands."""


@dataclass
class Generation:
    """Responder that generates with an engine; a `Responder`.

    Attributes:
        engine: Engine of the model.
        assembler: Assembler of the engine's answers.
        verbalised: Whether the model is asked for its confidence in a second turn.
        shows_progress: Whether this process shows its progress.
        forced: Function from jobs to the answers of a reference model that were forced through this one; None without.
        usage: Tokens and time spent so far.
    """

    engine: Engine
    assembler: Assembler
    verbalised: bool = False
    shows_progress: bool = True
    forced: Callable[[Sequence[Job]], Generator[tuple[int, ForcedAnswer]]] | None = None
    usage: Usage = field(default_factory=Usage)

    @property
    def batch_size(self) -> int:
        """Return the number of images answered together."""
        return self.engine.batch_size

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Answer every request once; see `Responder`."""
        ranked = [i for i, request in enumerate(requests) if request.options.get("candidates")]
        written = sorted(set(range(len(requests))) - set(ranked))
        jobs = [_job(requests[i], requests[i].first) for i in written]
        answers = dict(zip(written, self._answered(jobs, "Answering") if jobs else [], strict=True))
        scored = self._candidate_scores([requests[i] for i in ranked]) if ranked else []
        answers.update(zip(ranked, scored, strict=True))
        return [answers[i] for i in range(len(requests))]

    def generate_rounds(self, requests: Sequence[Request]) -> list[list[str]]:
        """Answer multi-round requests; see `Responder`."""
        asked: dict[int, Callable[[], Messages]] = {i: request.first for i, request in enumerate(requests)}
        answers: list[list[str]] = [[] for _ in requests]
        memory: list[Any] = [None] * len(requests)
        index = 0
        while asked:
            jobs = [_job(requests[i], messages) for i, messages in asked.items()]
            for i, answer in zip(asked, self._answered(jobs, f"Answering, round {index + 1}"), strict=True):
                answers[i].append(answer)
            index += 1
            rounds = {i: requests[i].next(index, answers[i], memory[i]) for i in asked}
            asked = {}
            for i, (messages, answers[i], memory[i]) in rounds.items():
                if messages is not None:
                    asked[i] = _giving(messages)
        return answers

    def scores(self, requests: Sequence[Request]) -> list[ContinuationScore]:
        """Return the log-probabilities of every request's continuation, token by token."""
        # Room for the longest: a token is a byte at least, and a tokenizer may put a space before it.
        sizes = [len(request.target.encode()) + 1 for request in requests if isinstance(request.target, str)]
        known, unknown = GenerationSettings(max_new_tokens=max(sizes, default=1)), GenerationSettings()
        jobs = [
            Job(request.first, request, known if isinstance(request.target, str) else unknown) for request in requests
        ]
        return self._scored(jobs, "Scoring")

    def _candidate_scores(self, requests: Sequence[Request]) -> list[str]:
        """Score the candidates that each request's message names, with one encoding of the image per request.

        Returns:
            For each request an encoded `Response` without text.
        """
        encoded = []
        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            part = requests[start : start + REQUESTS_AT_ONCE]
            asked = [candidates_of(request) for request in part]
            longest = max(self.engine.count_tokens(text) for _, texts in asked for text in texts)
            # A tokenizer may put a token of its own before a text.
            settings = GenerationSettings(max_new_tokens=longest + 2)
            jobs = [
                Job(_giving(messages), replace(request, target=f" {text}"), settings)
                for request, (messages, texts) in zip(part, asked, strict=True)
                for text in texts
            ]
            scores = iter(self._scored(jobs, f"Scoring candidates of {start + len(part)}/{len(requests)}"))
            for _, texts in asked:
                mine = [next(scores) for _ in texts]
                totals, tokens = tuple(s.total for s in mine), tuple(len(s.logprobs) for s in mine)
                encoded.append(encoded_scores({"logprob": totals, "tokens": tokens}))
        return encoded

    def _answered(self, jobs: Sequence[Job], title: str) -> list[str]:
        texts: dict[int, str] = {}
        responses: dict[int, Response] = {}
        leading = _leading(jobs) if self.assembler.facts else frozenset()
        leaders: dict[int, Response] = {}
        keeps = self.verbalised or self.forced is not None

        def take(index: int, answer: Answer) -> int:
            if answer.prompt.wants_confidence:
                response = self.assembler.response(answer)
                texts[index] = response.encode()
                if keeps:
                    responses[index] = response
                if index in leading:
                    leaders[index] = response
            else:
                texts[index] = self.assembler.plain(answer)
            return len(answer.generated.tokens)

        self._take_all(self.engine.answers(jobs), take, len(jobs), title)
        facts = self._facts() if leaders else {}
        with_facts = {index: replace(one, engine={**facts, **self._words(one)}) for index, one in leaders.items()}
        texts |= {index: one.encode() for index, one in with_facts.items()}
        if keeps:
            responses |= with_facts
        if self.verbalised:
            responses = self._with_statements(jobs, responses, f"{title}, and how sure")
        if self.forced is not None:
            responses = self._with_forced(jobs, responses, "Forcing the reference's answers")
        texts |= {index: one.encode() for index, one in responses.items()}
        return [texts[i] for i in range(len(jobs))]

    def _facts(self) -> Mapping[str, Any]:
        """Return the facts about the engine, with its answers to trial questions where evidence is kept."""
        if not self.assembler.keeps_ids:
            return self.assembler.facts
        with ends_the_command((RequestError,)), closing(self.engine.answers(trial_jobs())) as answers:
            return {**self.assembler.facts, "trials": told(answers)}

    def _words(self, leader: Response) -> Mapping[str, Any]:
        """Return the texts of a prompt's tokens by id, where ids are kept."""
        ids = () if leader.trace is None else leader.trace.ids
        return {"words": {str(index): self.assembler.spell(index) for index in sorted(set(ids))}} if ids else {}

    def _with_forced(self, jobs: Sequence[Job], responses: Mapping[int, Response], title: str) -> dict[int, Response]:
        """Return the responses with the reference's answers, forced through the model."""
        assert self.forced is not None
        asked = sorted(responses)
        found: dict[int, Response] = {}

        def take(index: int, answer: ForcedAnswer) -> int:
            found[asked[index]] = replace(responses[asked[index]], forced=answer)
            return len(answer.reference)

        # The speed of a run is that of its answers.
        own = replace(self.usage)
        self._take_all(self.forced([jobs[i] for i in asked]), take, len(asked), title)
        self.usage = own
        return found

    def _with_statements(
        self, jobs: Sequence[Job], responses: Mapping[int, Response], title: str
    ) -> dict[int, Response]:
        """Ask for the model's confidence in a second turn, and return the responses with its statements."""
        # Where reasoning did not end there is no answer to rate, and nothing is stated.
        asked = [i for i in sorted(responses) if responses[i].parts.finished]
        turns = [second_turn(jobs[i], responses[i], self.assembler.dialect) for i in asked]
        stated: dict[int, str] = {}

        def take(index: int, answer: Answer) -> int:
            stated[asked[index]] = answer.generated.text
            return len(answer.generated.tokens)

        self._take_all(self.engine.answers(turns, evidence=False), take, len(turns), title)
        return {i: replace(one, statement=stated.get(i, "")) for i, one in responses.items()}

    def _scored(self, jobs: Sequence[Job], title: str) -> list[ContinuationScore]:
        scores: dict[int, ContinuationScore] = {}

        def take(index: int, score: ContinuationScore) -> int:
            scores[index] = score
            return len(score.logprobs)

        self._take_all(self.engine.scores(jobs), take, len(jobs), title)
        return [scores[i] for i in range(len(jobs))]

    def _take_all(
        self,
        records: Generator[tuple[int, Record]],
        take: Callable[[int, Record], int],
        total: int,
        title: str,
    ) -> None:
        """Consume an engine's records, and record tokens and time.

        Args:
            records: Records with the index of their job.
            take: Function that stores a record and returns its number of tokens.
            total: Number of records.
            title: Title of the progress line.
        """
        tokens, started = 0, time.perf_counter()
        # An error ends the engine's background threads, too.
        with ends_the_command((RequestError,)), closing(records):
            for index, record in tqdm(records, total=total, desc=title, disable=not self.shows_progress):
                tokens += take(index, record)
        self.usage.tokens += tokens
        self.usage.seconds += time.perf_counter() - started


def _job(request: Request, messages: Callable[[], Messages]) -> Job:
    return Job(messages, request, GenerationSettings.from_kwargs(request.options))


def _leading(jobs: Sequence[Job]) -> frozenset[int]:
    """Return the job about the first document of each task, in whatever order they come."""
    first: dict[str, int] = {}
    for index, job in enumerate(jobs):
        task, document = job.request.place
        if task not in first or document < jobs[first[task]].request.place[1]:
            first[task] = index
    return frozenset(first.values())


def _giving(messages: Messages) -> Callable[[], Messages]:
    return lambda: messages
