"""The chat model that lmms-eval runs: any image-text-to-text checkpoint, quantized by any registered backend.

`--model quant_<backend>` finds its class here as an attribute made on demand (`QuantAwq` for `quant_awq`, and
`QuantAwqSimple` for lmms-eval's `--force_simple`), so that a new backend needs no line in this file.

The answer to a request does not depend on the batch it is in, up to floating point: padding changes the order of a
matrix product's additions, so the last bits of a logit differ between batches. In float32 that decides nothing in
practice; in bfloat16 two nearly equal tokens can change places, and then batch_size=1,share_prefix=False is the
reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import AutoProcessor

from lmms_plugin.arguments import ModelArguments, expect_effect, read_arguments
from lmms_plugin.ending import ends_the_command
from lmms_plugin.protocol import chat_templates
from lmms_plugin.protocol.dialects import Dialect, dialect_for
from lmms_plugin.protocol.plain_prompts import TEMPLATES, template_for
from lmms_plugin.protocol.prompts import Prompt, PromptReader, RequestError
from lmms_plugin.protocol.reasoning import ANSWER, REMEDY, tokens_among
from lmms_plugin.protocol.response import MARKER, Response
from lmms_plugin.quant_backends import class_name, get, names, option_types
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import expect_storable, save_quantized
from lmms_plugin.quant_backends.layers.kernels import default_dtype
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.utils.readable import readable
from lmms_plugin.vlm.generation.decoding import Answer, Decoder, Score
from lmms_plugin.vlm.generation.observer import Observer, Wanted
from lmms_plugin.vlm.generation.token_texts import decode
from lmms_plugin.vlm.processor import Batch, Chat
from lmms_plugin.vlm.requests import Messages, Request, candidates_of, read
from lmms_plugin.vlm.retrieval import AT_ONCE, Matcher, is_matcher
from lmms_plugin.vlm.runner import Runner, Step
from lmms_plugin.vlm.scheduling import Job
from lmms_plugin.vlm.second_turn import second_turn
from lmms_plugin.vlm.settings import Sampling, Settings

Result = TypeVar("Result")
REQUESTS_AT_ONCE = 4
"""Requests whose candidates are listed together: of each there may be thousands."""


class Likelihood(NamedTuple):
    """What lmms-eval's tasks take for the score of a continuation."""

    number: float
    is_greedy: bool

    def strip(self) -> str:
        """Look empty to the response cache, from which a pair would come back as a string that no task can read."""
        return ""


class QuantizedVLM(lmms):
    """A quantized vision-language model as lmms-eval runs it.

    Attributes:
        method: name of the quantization backend.
        report: what was quantized and what was not.
    """

    is_simple = False
    method: ClassVar[str] = "none"

    def __init__(self, **arguments: Any) -> None:
        """Load and quantize a checkpoint.

        Args:
            **arguments: see `ModelArguments`.

        Raises:
            ValueError: an argument is unknown or its value impossible, before anything is loaded.
            FileNotFoundError: there is no such checkpoint.
        """
        super().__init__()
        self.arguments = ModelArguments.parse(arguments, option_types(self.method))
        backend = get(self.method, **self.arguments.options)
        expect_effect(arguments, backend)
        if self.arguments.save_quantized:
            expect_storable(backend)
        plan = self.arguments.quant_plan(backend.default_bits)
        calibration = self.arguments.calibration_spec(backend.default_samples)
        wanted = Wanted.read(self.arguments, backend)
        path = self.arguments.find_checkpoint()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = _device(self.arguments, self.accelerator)
        self.chat, self.reader = _chat(path, self.arguments)
        if self.arguments.verbalised and (self.reader.raw or self.dialect.raw_prompt):
            raise ValueError(
                f"verbalised: {self.arguments.pretrained} is asked without chat template, and knows no second turn"
            )
        model, _, self.report = load_quantized(
            path,
            backend=backend,
            plan=plan,
            calibration=calibration,
            dtype=_dtype(self.arguments.dtype, self.device),
            device=self.device,
            device_map=self.arguments.device_map,
            attn_implementation=self.arguments.attn_implementation,
            trust_remote_code=self.arguments.trust_remote_code,
            seed=self.arguments.seed,
            use_safetensors=self.arguments.use_safetensors,
            processor=self.chat.processor,
            dialect=self.arguments.dialect,
            resume=self.arguments.resume,
            resume_folder=self.arguments.resume_folder,
        )
        self.observer: Observer | None = None
        self._tokens, self._seconds = 0, 0.0
        self._warned = self._warned_unfinished = False
        size = self.arguments.batch_size or AT_ONCE
        self.matcher = Matcher(model, self.chat.processor, size) if is_matcher(model) else None
        if self.matcher is None:
            self._prepare_to_write(model, wanted)
        elif wanted:
            raise ValueError(
                f"features, selector: {self.arguments.pretrained} is a retrieval checkpoint, which writes no answers"
            )
        self._account(model)

    def _prepare_to_write(self, model: Any, wanted: Wanted | None) -> None:
        self.decoder = Decoder.of(model, self.chat.tokenizer, static_cache=self.arguments.static_cache)
        self.observer = wanted.observer(self.arguments.find_checkpoint(), self.decoder, self.rank) if wanted else None
        self.runner = Runner.of(
            self.decoder,
            self.chat,
            self.reader,
            batch_size=self.arguments.batch_size,
            share_prefix=self.arguments.share_prefix,
            pooling=self.observer.pooling if self.observer else None,
            repeated=self.arguments.samples > 0,
        )
        silent = self.decoder.special - self.decoder.marks
        self._special = frozenset(decode(self.decoder.tokenizer, [token]) for token in silent)
        marks = [decode(self.decoder.tokenizer, [token]) for token in self.decoder.marks]
        self._answer_marks = tokens_among(marks, ANSWER)

    def _account(self, model: Any) -> None:
        """Say, note and keep what became of the checkpoint, as far as the user asks for it."""
        if self.rank != 0:
            return
        logger.info("{}\n{}", self.arguments.pretrained, self.report.table())
        if self.arguments.report:
            account = Path(self.arguments.report).expanduser()
            account.parent.mkdir(parents=True, exist_ok=True)
            account.write_text(self.report.to_json(), encoding="utf-8")
        if self.arguments.save_quantized:
            saved = save_quantized(model, self.chat.processor, self.report, self.arguments.save_quantized)
            logger.info("Saved to {}: {}", self.arguments.save_quantized, saved)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> QuantizedVLM:
        """Take `--model_args`, which win over what lmms-eval's command adds to them (`batch_size`, `device`)."""
        with ends_the_command():
            given = read_arguments(arg_string)
            added = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return cls(**{**added, **given})

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.decoder.model if self.matcher is None else self.matcher.model

    @property
    def batch_size(self) -> int:
        """Images answered together."""
        return self.runner.budget.limits.groups if self.matcher is None else self.matcher.batch_size

    @property
    def dialect(self) -> Dialect:
        """How this model is asked for boxes."""
        return self.reader.dialect

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request.

        Returns:
            Texts in the order of the requests. An answer to a message with the key "grounding" or "log_probabilities"
            is an encoded `Response`, and so are the scores where the generation options say `candidates`; any other is
            the plain text.

        Raises:
            RequestError: a document cannot be read or shown to this model; it is named.
            OutOfMemory: a batch does not fit; says what helps.
        """
        read_requests = read(requests, self.task_dict)
        ranked = [i for i, request in enumerate(read_requests) if request.options.get("candidates")]
        written = sorted(set(range(len(read_requests))) - set(ranked))
        jobs = [Job(r.first, r, Settings.from_kwargs(r.options)) for r in (read_requests[i] for i in written)]
        answers = dict(zip(written, self._answer(jobs, "Answering") if jobs else [], strict=True))
        scored = self._candidate_scores([read_requests[i] for i in ranked]) if ranked else []
        answers.update(zip(ranked, scored, strict=True))
        return [answers[i] for i in range(len(read_requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer tasks that ask again with earlier answers at hand, all requests one round at a time.

        Returns:
            For each request the answers of its rounds.
        """
        open_requests = dict(enumerate(read(requests, self.task_dict)))
        asked: dict[int, Callable[[], Messages]] = {i: request.first for i, request in open_requests.items()}
        answers: list[list[str]] = [[] for _ in requests]
        memory: list[Any] = [None] * len(requests)
        index = 0
        while asked:
            jobs = [
                Job(messages, open_requests[i], Settings.from_kwargs(open_requests[i].options))
                for i, messages in asked.items()
            ]
            for i, answer in zip(asked, self._answer(jobs, f"Answering, round {index + 1}"), strict=True):
                answers[i].append(answer)
            index += 1
            rounds = {i: open_requests[i].next(index, answers[i], memory[i]) for i in asked}
            asked = {}
            for i, (messages, answers[i], memory[i]) in rounds.items():
                if messages is not None:
                    asked[i] = _giving(messages)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Score every request's continuation as lmms-eval's own models do, which is not as its documentation says.

        lmms-eval 0.7 takes the choice with the smallest number for the answer to a multiple-choice question, because
        its models return a loss. So a choice gets its negative log-likelihood (in nats, summed over its tokens), while
        for tasks of type `loglikelihood`, which compute perplexity, the number is the log-likelihood itself.

        Returns:
            For each request, as `text` of the result, the number and whether greedy decoding would write the
            continuation. (lmms-eval turns bare pairs into strings, which its own tasks then cannot read.)
        """
        choices = [isinstance(request.target, str) for request in read(requests, self.task_dict)]
        pairs = zip(choices, self.scores(requests), strict=True)
        return [
            GenerationResult(Likelihood(-score.total if choice else score.total, score.is_greedy))
            for choice, score in pairs
        ]

    def scores(self, requests: Sequence[Any]) -> list[Score]:
        """Return the log-probabilities of every request's continuation, token by token."""
        read_requests = read(requests, self.task_dict)
        # Room for the longest: a token is a byte at least, and a tokenizer may put a space in front.
        sizes = [len(request.target.encode()) + 1 for request in read_requests if isinstance(request.target, str)]
        known, unknown = Settings(max_new_tokens=max(sizes, default=1)), Settings()
        jobs = [
            Job(request.first, request, known if isinstance(request.target, str) else unknown)
            for request in read_requests
        ]
        return self._run(jobs, self._score, "Scoring")

    def _candidate_scores(self, requests: Sequence[Request]) -> list[str]:
        """Score the candidates that each request's message names, those of one request over one encoding of its image.

        Returns:
            For each request an encoded `Response` without text.
        """
        if self.matcher is not None:
            return self.matcher.scores(requests, self.reader, self.world_size)
        encoded = []
        for start in range(0, len(requests), REQUESTS_AT_ONCE):
            part = requests[start : start + REQUESTS_AT_ONCE]
            asked = [candidates_of(request) for request in part]
            longest = max(len(self.chat.ids(text)) for _, texts in asked for text in texts)
            # In front of a text a tokenizer may put a token of its own.
            settings = Settings(max_new_tokens=longest + 2)
            jobs = [
                Job(_giving(messages), replace(request, target=f" {text}"), settings)
                for request, (messages, texts) in zip(part, asked, strict=True)
                for text in texts
            ]
            scores = iter(self._run(jobs, self._score, f"Scoring candidates of {start + len(part)}/{len(requests)}"))
            for _, texts in asked:
                mine = [next(scores) for _ in texts]
                totals, tokens = tuple(s.total for s in mine), tuple(len(s.logprobs) for s in mine)
                encoded.append(Response("", scores={"logprob": totals, "tokens": tokens}).encode())
        return encoded

    def clean(self) -> None:
        """Free the model; `report` stays.

        lmms-eval calls this when everything is answered. Here it is handed speed and size for the results file, because
        a run whose answers all come from the cache never asks for one.
        """
        log_metrics(
            total_elapsed_time=self._seconds,
            total_gen_tokens=self._tokens,
            avg_speed=self._tokens / self._seconds if self._seconds > 0 else 0.0,
            additional_metrics=self.report.totals(),
        )
        for name in {"decoder", "runner", "observer", "matcher"} & self.__dict__.keys():
            delattr(self, name)
        super().clean()

    def _answer(self, jobs: Sequence[Job], title: str) -> list[str]:
        answers = self._answered(jobs, title)
        if not self.arguments.verbalised:
            return answers
        responses = {i: Response.decode(answer) for i, answer in enumerate(answers) if MARKER in answer}
        # Where reasoning did not end there is no answer to be sure of, and nothing is stated.
        asked = {i: second_turn(jobs[i], one, self.dialect) for i, one in responses.items() if one.parts.finished}
        stated = dict(zip(asked, self._run(list(asked.values()), self._state, f"{title}, and how sure"), strict=True))
        for i, response in responses.items():
            answers[i] = replace(response, statement=stated.get(i, "")).encode()
        return answers

    def _answered(self, jobs: Sequence[Job], title: str) -> list[str]:
        if self.observer is None:
            return self._run(jobs, self._generate, title)
        self.observer.expect_unseen(jobs)
        answers = self._run(jobs, self._generate, title)
        self.observer.finish()
        return answers

    def _run(
        self,
        jobs: Sequence[Job],
        step: Step[tuple[Result, int]],
        title: str,
    ) -> list[Result]:
        """Do jobs, questions about one image together; results come back in the order of the jobs."""
        if self.matcher is not None and jobs:
            raise RequestError(
                f"{jobs[0].request.name}: {self.arguments.pretrained} is a retrieval checkpoint, which writes nothing; "
                "it scores captions (flickr30k_retrieval)"
            )
        results: dict[int, Result] = {}
        tokens, started = 0, time.perf_counter()
        done = tqdm(self.runner.run(jobs, step), total=len(jobs), desc=title, disable=self.rank != 0)
        with ends_the_command((RequestError,)):
            for index, (result, count) in done:
                results[index] = result
                tokens += count
        self._tokens += tokens
        self._seconds += time.perf_counter() - started
        return [results[i] for i in range(len(jobs))]

    def _generate(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[tuple[str, int]]:
        seeds = [job.request.seed(self.arguments.seed) for job in jobs]
        cache: Any = batch.inputs.get("past_key_values")
        columns = 0 if cache is None else cache.get_seq_length()
        answers, learned = self._answers(batch, prompts, jobs, seeds)
        sampled = self._sampled(batch, prompts, jobs, columns)
        rows = zip(prompts, batch.model_sizes, answers, learned, sampled, jobs, strict=True)
        return [(self._text(*row), len(row[2].tokens)) for row in rows]

    def _state(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[tuple[str, int]]:
        answers = self.decoder.generate(batch.inputs, jobs[0].settings)
        return [(answer.text, len(answer.tokens)) for answer in answers]

    def _sampled(
        self, batch: Batch, prompts: list[Prompt], jobs: list[Job], columns: int
    ) -> list[tuple[str, ...] | None]:
        """Sample further answers for a batch that was answered; None for prompts that want none.

        Over a shared prefix, of so many columns, each costs no more than its decoding; else it reads the image again.
        """
        if not self.arguments.samples or not any(prompt.wants_confidence for prompt in prompts):
            return [None] * len(prompts)
        settings = replace(jobs[0].settings, sampling=Sampling(self.arguments.sample_temperature))
        drawn: list[list[Answer]] = []
        for sample in range(self.arguments.samples):
            if columns:
                self.runner.sharing.rewind(batch.inputs, columns)
            seeds = [job.request.seed(self.arguments.seed, sample) for job in jobs]
            drawn.append(self.decoder.generate(batch.inputs, settings, seeds))
        rows = zip(prompts, zip(*drawn, strict=True), strict=True)
        return [tuple(self._raw(prompt, answer) for answer in answers) for prompt, answers in rows]

    def _raw(self, prompt: Prompt, answer: Answer) -> str:
        """The answer as its task reads it: with special tokens, which may be coordinates, where a box is wanted."""
        return answer.text if prompt.grounding is None else "".join(token.text for token in answer.tokens)

    def _answers(
        self, batch: Batch, prompts: list[Prompt], jobs: list[Job], seeds: list[int]
    ) -> tuple[list[Answer], list[Mapping[str, float]]]:
        """Answer a batch; the second list holds learned confidences of the answers by name."""
        settings = jobs[0].settings
        # Beams are rows of their own, and their answers have no log-probabilities.
        digits = any(prompt.grounding is not None and prompt.grounding.digits for prompt in prompts)
        if self.observer is None or settings.num_beams > 1:
            return self.decoder.generate(batch.inputs, settings, seeds, digits=digits), [{}] * len(prompts)
        with self.observer.pooling.watching(batch.inputs) as found:
            answers = self.decoder.generate(batch.inputs, settings, seeds, digits=digits)
        pooled = found[0] if batch.read is None else batch.read.followed_by(found[0])
        spoken = [self._spoken(*pair) for pair in zip(prompts, answers, strict=True)]
        return answers, self.observer.observe(pooled, prompts, jobs, spoken)

    def _text(
        self,
        prompt: Prompt,
        model_size: tuple[int, int] | None,
        answer: Answer,
        learned: Mapping[str, float],
        samples: tuple[str, ...] | None,
        job: Job,
    ) -> str:
        if not prompt.wants_confidence:
            return self._plain(answer)
        if job.settings.num_beams > 1:
            raise RequestError(f"{prompt.name}: log-probabilities of the answer are asked for; beam search has none")
        response = replace(self._response(prompt, answer), model_size=model_size, confidence=learned, samples=samples)
        self._warn_if_unfinished(response)
        if prompt.grounding is None:
            return response.encode()
        self._warn_if_unpublished()
        if self.dialect.requires_model_size and model_size is None:
            raise RequestError(
                f"{prompt.name}: dialect {self.dialect.name!r} counts pixels of the resized image, and "
                f"{type(self.chat.processor).__name__} does not tell its size"
            )
        size, digits = prompt.grounding.original_size, prompt.grounding.digits
        return replace(response, original_size=size, dialect=self.dialect.name, records_digits=digits).encode()

    def _response(self, prompt: Prompt, answer: Answer) -> Response:
        """The answer with its tokens, and with the reasoning that the prompt opened."""
        tokens = answer.tokens
        if prompt.grounding is None:
            tokens = tuple(token._replace(text="") if token.text in self._special else token for token in tokens)
        return Response("".join(token.text for token in tokens), tokens, opened=self.chat.opened_by(prompt))

    def _spoken(self, prompt: Prompt, answer: Answer) -> Answer:
        """The answer without the tokens of its reasoning."""
        if not prompt.wants_confidence:
            return answer
        return answer._replace(tokens=self._response(prompt, answer).spoken.tokens)

    def _plain(self, answer: Answer) -> str:
        """The answer's text for a task of lmms-eval's own: with reasoning, which its `--reasoning_tags` take out."""
        text = answer.text
        for mark in self._answer_marks:
            text = text.replace(mark, "")
        return text

    def _warn_if_unfinished(self, response: Response) -> None:
        if response.parts.finished or self._warned_unfinished or self.rank != 0:
            return
        self._warned_unfinished = True
        logger.warning("{}: an answer ends inside its reasoning, {}", self.arguments.pretrained, REMEDY)

    def _warn_if_unpublished(self) -> None:
        if not self.dialect.published and not self._warned and self.rank == 0:
            logger.warning(
                "{} publishes no way to ask for a box: it is asked in generic words (dialect {!r}), and a low accuracy "
                "says nothing about quantization",
                self.arguments.pretrained,
                self.dialect.name,
            )
        self._warned = True

    def _score(self, batch: Batch, prompts: list[Prompt], jobs: list[Job]) -> list[tuple[Score, int]]:
        rows = zip(prompts, batch.inputs["input_ids"][:, -1].tolist(), jobs, strict=True)
        given = [self.chat.continuation_ids(prompt, last, job.request.continuation()) for prompt, last, job in rows]
        scores = self.decoder.score(batch.inputs, given)
        return [(score, len(score.logprobs)) for score in scores]


def _giving(messages: Messages) -> Callable[[], Messages]:
    return lambda: messages


def _device(arguments: ModelArguments, accelerator: Accelerator) -> torch.device:
    """Choose the device: with several processes each has its own, and alone the user's choice or the best one."""
    if accelerator.num_processes > 1 and arguments.device_map is not None:
        raise ValueError(
            f"device_map spreads one model over all devices and cannot be combined with {accelerator.num_processes} "
            "processes, which have one each"
        )
    if accelerator.num_processes > 1 or arguments.device == "auto":
        return torch.device(accelerator.device)
    return torch.device(arguments.device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return default_dtype(device.type)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _chat(path: str, arguments: ModelArguments) -> tuple[Chat, PromptReader]:
    name = arguments.pretrained
    remote = {"trust_remote_code": arguments.trust_remote_code}
    config = config_of(path, **remote)
    declared = arguments.dialect or getattr(config, "grounding_dialect", None)
    dialect = dialect_for(config.model_type, declared)
    with readable(f"{path}: its processor or tokenizer"):
        processor = AutoProcessor.from_pretrained(path, **remote)
    plain, apart = template_for(processor), bool(getattr(config, "is_encoder_decoder", False))
    templated = chat_templates.is_for(processor, dialect)
    chat_templates.adopt(processor, dialect, name)
    if apart and plain is None:
        raise ValueError(
            f"{name} is an encoder-decoder ({config.model_type}), none of those that are supported: "
            f"{', '.join(TEMPLATES)}"
        )
    variables = arguments.template_variables
    chat_templates.expect_variables(processor, variables, name)
    chat = Chat(processor, arguments.max_num_frames, answers_apart=apart, template_variables=variables)
    if templated and chat.has_template:
        chat_templates.expect_images_shown(processor, variables, name)
    elif templated:
        logger.warning(
            "{} brings no chat template: it is asked in plain words behind the tokens of its images. If it was "
            "taught to chat, its answers say little; put its template into the folder as chat_template.jinja",
            name,
        )
    if chat.places_images and None in (processor.num_query_tokens, config.image_token_id):
        raise ValueError(
            f"{name} is of the time before processors put images into prompts: expected num_query_tokens in its "
            "processor_config.json and image_token_index in its config.json"
        )
    chat.set_pixel_limits(arguments.min_pixels, arguments.max_pixels)
    system_prompt = arguments.read_system_prompt()
    if system_prompt:
        chat.expect_system_prompts()
    if system_prompt and plain is not None:
        raise ValueError(f"system_prompt: {name} has no chat template, and its family knows no system message")
    return chat, PromptReader(dialect, system_prompt, chat.background, raw=not chat.has_template, plain=plain)


def __getattr__(name: str) -> type[QuantizedVLM]:
    backends = {class_name(backend): backend for backend in names()}
    backend = backends.get(name.removesuffix("Simple"))
    if backend is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    simple = name.endswith("Simple")
    body = {"method": backend, "is_simple": simple, "__module__": __name__, "__doc__": QuantizedVLM.__doc__}
    created: type[QuantizedVLM] = type(name, (QuantizedVLM,), body)
    globals()[name] = created
    return created
