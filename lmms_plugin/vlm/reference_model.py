"""Reference model beside the one that is evaluated: its answers are forced through the other, token by token.

The reference answers a question, and its distribution over the whole vocabulary is kept at each token. The evaluated
model then reads the same image and prompt and is made to write the same tokens, so that at each of them both
distributions are conditional on the same text, and their KL divergence is exact. llama.cpp does this for text
(`tools/perplexity --kl-divergence`, https://github.com/ggml-org/llama.cpp/pull/5076).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.protocol.prompts import Prompt, PromptReader
from lmms_plugin.protocol.response import ForcedAnswer, Token
from lmms_plugin.utils import hashing
from lmms_plugin.utils.arithmetic import arithmetic
from lmms_plugin.utils.model_identity import identity_of
from lmms_plugin.vlm.assembling import read
from lmms_plugin.vlm.contracts.engine import Answer
from lmms_plugin.vlm.contracts.requests import Job
from lmms_plugin.vlm.generation.decoding import Decoder
from lmms_plugin.vlm.generation.number_tokens import DigitRecorder
from lmms_plugin.vlm.generation.processor import Batch, Chat
from lmms_plugin.vlm.generation.whole_vocabulary import DistributionKeeper, DivergenceRecorder
from lmms_plugin.vlm.kept_reference import KeptAnswer, KeptReference, digest_of
from lmms_plugin.vlm.local_engine import LocalEngine
from lmms_plugin.vlm.running.runner import Runner

KEPT_BYTES = 1 << 30
"""Memory of the host that the kept distributions of a part of the questions may take."""
MOST_AT_ONCE = 256
_BYTES = 4


@dataclass
class ReferenceModel:
    """Reference of a loaded model, asked through a runner of its own.

    Attributes:
        runner: Runner of the reference.
        engine: Engine of the model that its answers are forced through.
        kept: Its answers to other runs; None to have it answer every time.
    """

    runner: Runner
    engine: LocalEngine
    kept: KeptReference | None = None

    @classmethod
    def of(
        cls, model: Any, engine: LocalEngine, chat: Chat, reader: PromptReader, arguments: ModelArguments
    ) -> ReferenceModel:
        """Set up for a loaded reference.

        Args:
            model: Reference model, with a cache of its own, which is never quantized.
            engine: Engine of the model that is evaluated.
            chat: Processor of that model, which makes the prompts of both.
            reader: Reader that converts messages to prompts.
            arguments: Arguments of the model that is evaluated.
        """
        decoder = Decoder.of(model, chat.tokenizer, static_cache=arguments.static_cache)
        runner = Runner.of(decoder, chat, reader, batch_size=arguments.batch_size, share_prefix=arguments.share_prefix)
        kept = None
        if arguments.shared_folder:
            kept = KeptReference.of(arguments.shared_folder, _key(model, engine, chat, arguments))
        return cls(runner, engine, kept)

    def forced(self, jobs: Sequence[Job]) -> Generator[tuple[int, ForcedAnswer]]:
        """Yield the index of a job with the reference's answer, forced through the model.

        Raises:
            RequestError: A document cannot be read or shown to this model; it is named.
            OutOfMemory: A batch does not fit; the message says what helps.
            ValueError: The vocabularies differ in size.
        """
        at_once = self._at_once(jobs)
        for start in range(0, len(jobs), at_once):
            part = jobs[start : start + at_once]
            known = None if self.kept is None else self.kept.load(part)
            forced = {} if known is None else dict(self._forced(part, known))
            if known is None or None in forced.values():
                # Nothing is known, or these places have other questions now.
                answers = dict(self.runner.run(part, self._answer))
                written = [answers[index] for index in range(len(part))]
                if self.kept is not None:
                    self.kept.keep(part, written)
                forced = dict(self._forced(part, written))
            for index, answer in forced.items():
                assert answer is not None
                yield start + index, answer

    def _forced(self, jobs: Sequence[Job], answers: Sequence[KeptAnswer]) -> Generator[tuple[int, ForcedAnswer | None]]:
        kept = {_place(job): answer for job, answer in zip(jobs, answers, strict=True)}
        yield from self.engine.runner.run(jobs, partial(self._force, kept))

    def _at_once(self, jobs: Sequence[Job]) -> int:
        longest = max((job.settings.max_new_tokens for job in jobs), default=1)
        vocabulary: int = self.runner.decoder.model.config.get_text_config(decoder=True).vocab_size
        return max(1, min(MOST_AT_ONCE, KEPT_BYTES // (_BYTES * vocabulary * longest)))

    def _answer(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[KeptAnswer]:
        keeper, seeds = DistributionKeeper(), [job.request.seed(self.engine.seed) for job in jobs]
        generated = self.runner.decoder.generate(
            batch.inputs, jobs[0].settings, seeds, digits=_of_digits(prompts), watchers=(keeper,)
        )
        found = []
        for row, (prompt, one) in enumerate(zip(prompts, generated, strict=True)):
            tokens = read(Answer(prompt, one), self.engine.traits).tokens
            found.append(KeptAnswer(tokens, one.ids, keeper.row(row, len(one.ids)), digest_of(prompt)))
        return found

    def _force(
        self, kept: Mapping[object, KeptAnswer], batch: Batch, prompts: list[Prompt], jobs: list[Job]
    ) -> list[ForcedAnswer | None]:
        decoder, rows = self.engine.decoder, [kept[_place(job)] for job in jobs]
        if any(row.prompt != digest_of(prompt) for row, prompt in zip(rows, prompts, strict=True)):
            return [None] * len(rows)
        divergences = DivergenceRecorder([row.distributions for row in rows])
        digits = DigitRecorder(decoder.number_tokens) if _of_digits(prompts) else None
        watchers = (divergences,) if digits is None else (divergences, digits)
        scores = decoder.score(batch.inputs, [row.ids for row in rows], watchers)
        alternatives = None if digits is None else digits.alternatives()
        found: list[ForcedAnswer | None] = []
        for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
            others = [None] * len(row.ids) if alternatives is None else alternatives[index]
            steps = zip(row.tokens, score.logprobs, others, strict=False)
            forced = tuple(Token(token.text, logprob, other) for token, logprob, other in steps)
            apart, agreed = divergences.of(index)
            size = len(row.tokens)
            found.append(ForcedAnswer(row.tokens, forced, apart[:size], agreed[:size]))
        return found


def _key(model: Any, engine: LocalEngine, chat: Chat, arguments: ModelArguments) -> dict[str, Any]:
    """Return what the reference's answers depend on, to the last bit, besides the questions."""
    of_answers = ("batch_size", "share_prefix", "static_cache", "system_prompt", "dialect", "max_num_frames")
    return {
        **identity_of(arguments.find_reference(), model, chat.processor),
        "template": repr(chat.template_variables),
        "arguments": {name: str(getattr(arguments, name)) for name in of_answers},
        "seed": engine.seed,
        "map": str(getattr(model, "hf_device_map", None)),
        "arithmetic": [str(model.device), arithmetic()],
        "code": hashing.of_package(),
    }


def _of_digits(prompts: Sequence[Prompt]) -> bool:
    return any(prompt.grounding is not None and prompt.grounding.digits for prompt in prompts)


def _place(job: Job) -> object:
    """Return what tells the jobs of one call apart."""
    return job.request.place, job.request.repeat
