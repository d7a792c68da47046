"""Token-by-token decoding that keeps the log-probability of each chosen token; watchers see the whole vocabulary.

Both modes, generating an answer and scoring a given one, use `model.generate`: positions, caches and attention masks
are then those of the model's own code, for every architecture, and a score means the same as the log-probabilities of a
generated answer.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from lmms_plugin.protocol.response import Alternatives, Token
from lmms_plugin.utils.end_tokens import end_tokens, writers
from lmms_plugin.utils.processes.out_of_memory import while_answering
from lmms_plugin.vlm.contracts.engine import ContinuationScore, Generated
from lmms_plugin.vlm.contracts.settings import GenerationSettings, Sampling
from lmms_plugin.vlm.generation.mask_positions import number_by_mask
from lmms_plugin.vlm.generation.number_tokens import DigitRecorder, NumberTokens
from lmms_plugin.vlm.generation.special_tokens import special_tokens
from lmms_plugin.vlm.generation.token_texts import cut, decode, token_texts
from lmms_plugin.vlm.generation.whole_vocabulary import StepWatcher
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer

NO_TOKEN = 2**31 - 1
"""An id that no vocabulary has."""


@dataclass
class Decoder:
    """Model with its tokenizer, ready to generate.

    Attributes:
        model: Any Hugging Face model with `generate`.
        tokenizer: Tokenizer of the model.
        ends: Ids of the tokens that end an answer.
        special: Ids of the tokens that are no text.
        marks: Ids of those among them that separate reasoning and answer.
        static_cache: Whether keys and values have a static cache, with which transformers compiles decoding on a GPU.
        cache_quantizer: Maker of quantized caches; None for caches as the model has them.
    """

    model: Any
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    special: frozenset[int]
    marks: frozenset[int] = frozenset()
    static_cache: bool = False
    cache_quantizer: CacheQuantizer | None = None

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Tokenizer,
        *,
        static_cache: bool = False,
        cache_quantizer: CacheQuantizer | None = None,
    ) -> Decoder:
        """Set up from a checkpoint, using only its settings for the end and the padding of an answer.

        Sampling, penalties and lengths in its generation_config.json are dropped, because they would silently join
        those of a task.
        """
        if not isinstance(model, GenerationMixin):
            raise ValueError(
                f"{type(model).__name__} does not write token by token (it has no generate of transformers' "
                "GenerationMixin): its answers have no probabilities, and this family is not supported"
            )
        ends = end_tokens(model, tokenizer)
        if not ends:
            raise ValueError("Neither generation_config.json nor the tokenizer of this checkpoint names an eos token")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
        for part in writers(model):
            given = part.generation_config
            kept = {"bos_token_id": given.bos_token_id, "decoder_start_token_id": given.decoder_start_token_id}
            part.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=list(ends), **kept)
        number_by_mask(model)
        special, marks = special_tokens(tokenizer, ends)
        # A copy of its own, because background threads encode meanwhile.
        return cls(model, copy.deepcopy(tokenizer), ends, special, marks, static_cache, cache_quantizer)

    @property
    def with_plain_cache(self) -> Decoder:
        """Return the same without quantization of keys and values."""
        return self if self.cache_quantizer is None else replace(self, cache_quantizer=None)

    @cached_property
    def number_tokens(self) -> NumberTokens:
        """Return the tokens of digits."""
        return NumberTokens(self.tokenizer)

    def generate(
        self,
        inputs: Mapping[str, Tensor],
        settings: GenerationSettings,
        seeds: Sequence[int] | None = None,
        *,
        digits: bool = False,
        watchers: Sequence[StepWatcher] = (),
    ) -> list[Generated]:
        """Generate one answer per row of the batch.

        Args:
            inputs: Keyword arguments of the model, on its device; `input_ids` (rows, prompt length) padded on the left,
                or on the right for an encoder-decoder.
            settings: Settings, the same for all rows.
            seeds: Seeds for sampling, one per row: a row's sample depends on its own seed and not on its batch.
            digits: Whether to record, for tokens of digits, the probabilities of the others (`Token.alternatives`).
            watchers: Watchers of each step's logits; a beam search has none.

        Raises:
            OutOfMemory: The batch does not fit; the message says what helps.
            FloatingPointError: The model's logits are not numbers.
        """
        if settings.num_beams > 1:
            return self._search(inputs, settings)
        prompt_length = self.read(inputs).shape[1]
        digit_recorder = DigitRecorder(self.number_tokens) if digits else None
        ends = _Ends(self.tokenizer, self.ends, settings.until, prompt_length)
        recorder = _Recorder(_RawLogits(), ends, (*watchers, *([digit_recorder] if digit_recorder else ())))
        processors: list[LogitsProcessor] = [recorder.raw]
        if settings.repetition_penalty != 1:
            processors.append(_RepetitionPenalty(settings.repetition_penalty, self.read(inputs)))
        if settings.sampling is not None:
            if seeds is None:
                raise ValueError("Sampling needs one seed per row")
            processors.append(_Drawn(settings.sampling, seeds))
        config = GenerationConfig(max_new_tokens=settings.max_new_tokens, eos_token_id=list(self.ends), do_sample=False)
        ids = self._run(inputs, config, processors, recorder)
        rows = zip(ids.tolist(), recorder.logprobs(), recorder.ends.lengths.tolist(), strict=True)
        answers = [self.as_answer(row[:length], logprobs[:length], settings.until) for row, logprobs, length in rows]
        recorded = None if digit_recorder is None else digit_recorder.alternatives()
        if recorded is None:
            return answers
        return [_with_alternatives(answer, row) for answer, row in zip(answers, recorded, strict=True)]

    def score(
        self,
        inputs: Mapping[str, Tensor],
        continuations: Sequence[Sequence[int]],
        watchers: Sequence[StepWatcher] = (),
    ) -> list[ContinuationScore]:
        """Score one given continuation per row of the batch, by forcing the model to generate it.

        Args:
            inputs: Keyword arguments, as in `generate`.
            continuations: Token ids, may be empty.
            watchers: Watchers of each step's logits.

        Raises:
            OutOfMemory: The batch does not fit; the message says what helps.
            FloatingPointError: The model's logits are not numbers.
        """
        longest = max(map(len, continuations))
        if longest == 0:
            return [ContinuationScore((), True) for _ in continuations]
        recorder = _Recorder(_RawLogits(), None, watchers)
        forced = _Forced(continuations, self.read(inputs).shape[1], inputs["input_ids"].device)
        # Scored text may continue after an end token.
        config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=NO_TOKEN)
        self._run(inputs, config, [recorder.raw, forced], recorder)
        rows = zip(recorder.logprobs(), recorder.greedy(), continuations, strict=True)
        return [
            ContinuationScore(tuple(logprobs[: len(given)]), all(greedy[: len(given)]))
            for logprobs, greedy, given in rows
        ]

    @property
    def answers_apart(self) -> bool:
        """Return whether an answer does not continue the prompt, as with an encoder-decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the mask, 1 at tokens and 0 at padding, of what `generate` returns before its answers.

        That is the prompt, or for an encoder-decoder the one token that every answer begins with.
        """
        mask = inputs["attention_mask"]
        return torch.ones_like(mask[:, :1]) if self.answers_apart else mask

    def writer(self, inputs: Mapping[str, Tensor]) -> Any:
        """Return the module that generates: the model, or the language model within it.

        The latter where no image is left to read, since `generate` of the whole model requires one.
        """
        if "pixel_values" in inputs or not self._demands_image:
            return self.model
        return self.model.language_model

    @cached_property
    def _demands_image(self) -> bool:
        given = inspect.signature(self.model.generate).parameters.get("pixel_values")
        return given is not None and given.default is given.empty

    def _run(
        self,
        inputs: Mapping[str, Tensor],
        config: GenerationConfig,
        processors: list[LogitsProcessor],
        recorder: _Recorder,
    ) -> Tensor:
        if self.static_cache and "past_key_values" not in inputs:
            config.cache_implementation = "static"
        with while_answering(len(inputs["input_ids"])), self._caching(inputs, config) as cached:
            ids: Tensor = generate_of(self.writer(inputs))(
                **cached,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([recorder]),
            )
        return ids[:, self.read(inputs).shape[1] :]

    @contextmanager
    def _caching(self, inputs: Mapping[str, Any], config: GenerationConfig) -> Iterator[Mapping[str, Any]]:
        """Give a generation a quantized cache, if caches are quantized, and record its size afterwards."""
        quantizer = self.cache_quantizer
        if quantizer is None:
            yield inputs
            return
        cache = inputs.get("past_key_values")
        if cache is None:
            cache = quantizer.cache(inputs["input_ids"], inputs["attention_mask"], repeats=config.num_beams or 1)
        unread = inputs["input_ids"].shape[1] - 1 - cache.get_seq_length()
        if quantizer.reads_last_apart and unread > 0:
            config.prefill_chunk_size = unread
        yield {**inputs, "past_key_values": cache}
        quantizer.note(cache)

    def _search(self, inputs: Mapping[str, Tensor], settings: GenerationSettings) -> list[Generated]:
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=list(self.ends),
            do_sample=False,
            num_beams=settings.num_beams,
        )
        processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            of_beams = self.read(inputs).repeat_interleave(settings.num_beams, dim=0)
            processors.append(_RepetitionPenalty(settings.repetition_penalty, of_beams))
        with while_answering(len(inputs["input_ids"])), self._caching(inputs, config) as cached:
            ids = generate_of(self.writer(inputs))(**cached, generation_config=config, logits_processor=processors)
        ids = ids[:, self.read(inputs).shape[1] :]
        return [
            self.as_answer(row, [math.nan] * len(row), settings.until) for row in map(self._until_end, ids.tolist())
        ]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((position for position, token in enumerate(ids) if token in self.ends), len(ids) - 1)
        return ids[: end + 1]

    def as_answer(self, ids: list[int], logprobs: list[float], until: Sequence[str]) -> Generated:
        """Return new tokens as an answer, cut before the first of `until`, without special tokens except marks.

        Args:
            ids: Ids of the new tokens, including the one that ends the answer.
            logprobs: Log-probabilities, one per token.
            until: Texts that end an answer.
        """
        ended = bool(ids) and ids[-1] in self.ends
        texts = token_texts(self.tokenizer, ids[:-1] if ended else ids) + [""] * ended
        kept = cut(texts, until)
        silent = self.special - self.marks
        text = "".join(text for text, token in zip(kept, ids, strict=False) if token not in silent)
        return Generated(tuple(map(Token, kept, logprobs)), text, tuple(ids))


def generate_of(model: Any) -> Callable[..., Tensor]:
    """Return the method that generates text.

    A model's own `generate` that takes logits processors separately is not for text alone (Janus draws images with it,
    and drops them where it writes); for such models it is the one that it overrides.
    """
    own = type(model).generate
    if own is not GenerationMixin.generate and "logits_processor" in inspect.signature(own).parameters:
        return partial(GenerationMixin.generate, model)
    generate: Callable[..., Tensor] = model.generate
    return generate


def _with_alternatives(answer: Generated, recorded: Sequence[Alternatives | None]) -> Generated:
    pairs = zip(answer.tokens, recorded, strict=False)
    return answer._replace(tokens=tuple(token._replace(alternatives=alternatives) for token, alternatives in pairs))


class _RawLogits(LogitsProcessor):
    """Holder of the current step's logits, before anything changes them."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores


class _RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """Repetition penalty on tokens that a row has read or written, without padding, which transformers' own counts."""

    def __init__(self, penalty: float, attention_mask: Tensor) -> None:
        super().__init__(penalty)
        self.is_padding = attention_mask == 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = self.is_padding.shape[1]
        # The last token of a prompt is never padding; repeating it changes nothing.
        prompt = torch.where(self.is_padding, input_ids[:, width - 1 : width], input_ids[:, :width])
        penalised: Tensor = super().__call__(torch.cat([prompt, input_ids[:, width:]], dim=1), scores)
        return penalised


class _Forced(LogitsProcessor):
    """Processor that allows one token only: the next one of a given continuation."""

    def __init__(self, continuations: Sequence[Sequence[int]], prompt_length: int, device: torch.device) -> None:
        longest = max(map(len, continuations))
        padded = [[*given, *[0] * (longest - len(given))] for given in continuations]
        self.ids = torch.tensor(padded, device=device)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        return _only(self.ids[:, step : step + 1], scores)


class _Drawn(LogitsProcessor):
    """Processor that allows one token only: the one sampled for the row with its own random numbers."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.streams = [random.Random(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        if sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = self.warpers(input_ids, scores).softmax(1).cumsum(1)
        uniform = torch.tensor([[stream.random()] for stream in self.streams], device=scores.device)
        # 1 - uniform is in (0, 1], so that a token of probability 0 is never the first to reach it.
        drawn = torch.searchsorted(cumulative, (1 - uniform) * cumulative[:, -1:])
        return _only(drawn, scores)


def _only(chosen: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen.to(scores.device), 0.0)


class _Ends:
    """Record, for each row, of whether its answer has ended, and after how many tokens."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], until: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.until = until
        self.prompt_length = prompt_length
        # A token is at least one byte, so a string that has just been completed lies within this many tokens, except
        # for tokens without text of their own; the final cut looks at the whole answer.
        self.window = max((len(string.encode()) for string in until), default=0) + 8

    def update(self, input_ids: Tensor) -> Tensor:
        last = input_ids[:, -1]
        if input_ids.shape[1] == self.prompt_length + 1:
            self.done = torch.zeros_like(last, dtype=torch.bool)
            self.lengths = torch.zeros_like(last)
        if not hasattr(self, "done"):
            raise RuntimeError(
                f"this model's generate puts other tokens in front of its answer than the {self.prompt_length} of its "
                "prompt, so that the answer cannot be told apart; this family is not supported"
            )
        self.lengths += (~self.done).long()
        self.done |= torch.isin(last, torch.tensor(self.ends, device=last.device))
        if self.until:
            self.done |= torch.tensor(self._has_string(input_ids), device=last.device)
        return self.done

    def _has_string(self, input_ids: Tensor) -> list[bool]:
        tails = input_ids[:, self.prompt_length :][:, -self.window :].tolist()
        texts = (decode(self.tokenizer, tail) for tail in tails)
        return [any(string in text for string in self.until) for text in texts]


class _Recorder(StoppingCriteria):
    """Recorder of the log-probability of each chosen token, from the logits of that step alone."""

    def __init__(self, raw: _RawLogits, ends: _Ends | None, watchers: Sequence[StepWatcher] = ()) -> None:
        self.raw = raw
        self._ends = ends
        self._watchers = watchers
        self._logprobs: list[Tensor] = []
        self._greedy: list[Tensor] = []

    @property
    def ends(self) -> _Ends:
        assert self._ends is not None
        return self._ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        logits = self.raw.logits
        if logits is None:
            raise RuntimeError("this model's generate drops logits processors, so that no probability can be recorded")
        chosen = input_ids[:, -1:].to(logits.device)
        total = logits.logsumexp(1)
        self._logprobs.append(logits.gather(1, chosen).squeeze(1) - total)
        for watcher in self._watchers:
            watcher.note(logits, total, chosen.squeeze(1))
        if self._ends is not None:
            return self._ends.update(input_ids)
        self._greedy.append(logits.argmax(1) == chosen.squeeze(1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def logprobs(self) -> list[list[float]]:
        """Return the log-probabilities, one list per row, including padding after an answer's end."""
        logprobs = torch.stack(self._logprobs, dim=1).clamp(max=0.0)
        if logprobs.isnan().any():
            raise FloatingPointError(
                "The model's logits are not numbers (NaN). A checkpoint or quantization is broken, or its activations "
                "overflow: compare with quant_none and dtype=float32."
            )
        return logprobs.tolist()

    def greedy(self) -> list[list[bool]]:
        """Return whether each forced token was the likeliest, one list per row."""
        return torch.stack(self._greedy, dim=1).tolist()
