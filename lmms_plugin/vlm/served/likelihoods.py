"""Likelihoods of given texts, from servers that tell how probable the tokens of a prompt are."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.served.asking import Asking, messages_of
from lmms_plugin.vlm.served.checking import ExpectedPrompt
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.tokens import as_logprob

_ONE = GenerationSettings(max_new_tokens=1)
"""Servers generate a token at least; it is not looked at."""


class GivenText(NamedTuple):
    """A text whose likelihood as the answer to a prompt is asked for.

    Attributes:
        job: number of the job that it belongs to.
        prompt: as our processor shows it, without the text.
        images: name -> data URL of its images.
        names: of its images, in order.
        said: the answer that the chat template turns into the text.
        whole: prompt and text, with one placeholder per image.
        ids: of the text's tokens, at least one.
        expected: what our processor makes of the prompt without the text.
    """

    job: int
    prompt: Prompt
    images: Mapping[str, bytes]
    names: Sequence[str]
    said: str
    whole: str
    ids: tuple[int, ...]
    expected: ExpectedPrompt


class Told(NamedTuple):
    """What a server says of a given text.

    Attributes:
        read: of the whole prompt, in the form of the chat API (`prompt_token_ids`, `usage`).
        logprobs: natural log-probability of each of the text's tokens.
        is_greedy: whether each is the most probable one.
    """

    read: Mapping[str, Any]
    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def score(self) -> ContinuationScore:
        """The same as every engine gives it."""
        return ContinuationScore(self.logprobs, self.is_greedy)


class Likelihoods(Protocol):
    """One server's way to tell likelihoods of given texts."""

    def request(self, given: GivenText) -> dict[str, Any]:
        """Return the body of a request; images stand in it by name."""

    def ask(self, client: Client, given: GivenText, body: Mapping[str, Any]) -> Told:
        """Ask.

        Raises:
            ServerError: there is no answer, or it tells no likelihood of just these tokens.
        """


@dataclass(frozen=True)
class PromptLogprobs:
    """`prompt_logprobs` of the chat API, as vLLM has it: the text is an answer that the server is to continue.

    Each request has a salt that no other one had. vLLM may else take the beginning of a text from its cache, for which
    some of its versions tell the log-probabilities of another request (issue 42019 there).

    Attributes:
        asking: writes requests.
    """

    asking: Asking

    def request(self, given: GivenText) -> dict[str, Any]:
        """Return the body of a request; see `Likelihoods`."""
        said = {"role": "assistant", "content": [{"type": "text", "text": given.said}]}
        body = self.asking.body([*messages_of(given.prompt, given.names), said], _ONE, probabilities=False)
        return {**body, "add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 0}

    def ask(self, client: Client, given: GivenText, body: Mapping[str, Any]) -> Told:
        """Ask; see `Likelihoods`."""
        response = client.chat({**body, "cache_salt": uuid.uuid4().hex}, given.images)
        entries = response.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise ServerError(
                "the server tells no log-probabilities of given texts (multiple choice, retrieval): of the engines "
                "known here vLLM and SGLang do; serve with one of these, or run the task with a model that is loaded "
                "here (quant_none, quant_prequantized, ...)"
            )
        count = len(given.ids)
        rows = [_row(row, Mapping, "prompt_logprobs", "a mapping of token ids") or {} for row in entries[-count:]]
        told = [_entry(row, index) for row, index in zip(rows, given.ids, strict=False)]
        if len(told) != count or None in told:
            raise _other_tokens(given, [list(row) for row in rows])
        found = [one for one in told if one is not None]
        logprobs = tuple(as_logprob(float(one["logprob"]), str(one.get("decoded_token"))) for one in found)
        return Told(response, logprobs, all(one["rank"] == 1 for one in found))


@dataclass(frozen=True)
class NativeGenerate:
    """`/generate` of SGLang, whose chat API tells nothing of prompts: prompt and text are sent as one."""

    def request(self, given: GivenText) -> dict[str, Any]:
        """Return the body of a request; see `Likelihoods`."""
        return {
            "text": given.whole,
            "image_data": list(given.names),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            # The first token from there on has none.
            "logprob_start_len": given.expected.length - 1,
            "top_logprobs_num": 1,
            "stream": False,
        }

    def ask(self, client: Client, given: GivenText, body: Mapping[str, Any]) -> Told:
        """Ask; see `Likelihoods`."""
        response = client.post(f"{client.root}/generate", body, given.images)
        meta = response.get("meta_info")
        told = meta.get("input_token_logprobs") if isinstance(meta, Mapping) else None
        if not isinstance(meta, Mapping) or not isinstance(told, list):
            raise ServerError(
                f"expected meta_info with input_token_logprobs in SGLang's response, got {', '.join(response)}"
            )
        count = len(given.ids)
        rows = [_pair(row, "input_token_logprobs") for row in told[-count:]]
        ids = [index for _, index in rows]
        if ids != list(given.ids):
            raise _other_tokens(given, ids)
        top = meta.get("input_top_logprobs")
        if not isinstance(top, list) or len(top) < count:
            raise ServerError(f"expected input_top_logprobs of {count} tokens in SGLang's response, got {top!r:.80}")
        # Without the most probable token of a place, none there is.
        best = [_pair(row[0], "input_top_logprobs")[1] if row else None for row in top[-count:]]
        logprobs = tuple(as_logprob(value, str(index)) for value, index in rows)
        return Told({"usage": {"prompt_tokens": meta.get("prompt_tokens")}}, logprobs, best == ids)


def likelihoods_of(engine: str | None, asking: Asking) -> Likelihoods | None:
    """Return how a server tells likelihoods of given texts; None where it cannot.

    Args:
        engine: that it names; None if unknown.
        asking: writes requests.
    """
    if engine == "sglang":
        return NativeGenerate()
    return PromptLogprobs(asking) if asking.form.extended else None


def shown(chat: Chat, prompt: Prompt, continuation: str) -> tuple[str, str, tuple[int, ...]]:
    """Return the answer that a chat template turns into a continuation of a prompt, the whole, and the answer's ids.

    Raises:
        RequestError: the template shows no answer in the tokens that a model would write.
    """
    before = chat.ids(chat.text_of(prompt))
    ids = chat.continuation_ids(prompt, before[-1], continuation)
    # Some templates write the space between turn and answer themselves.
    for said in dict.fromkeys((continuation, continuation.lstrip(" "))):
        try:
            whole = chat.continued_by(prompt, said)
        except ValueError:
            continue
        if chat.ids(whole) == [*before, *ids]:
            return said, whole, tuple(ids)
    raise RequestError(
        f"{prompt.name}: the checkpoint's chat template shows {continuation!r:.80} as an answer in other tokens than a "
        "model would write, so that no server can tell its likelihood; run this task with a model that is loaded here"
    )


def _row(row: Any, kind: type, field: str, expected: str) -> Any:
    """Return one row of a server's numbers, an empty one where it tells nothing of a token."""
    if row is not None and not isinstance(row, kind):
        raise ServerError(f"expected rows of {field} to be {expected} each, got {row!r:.80}")
    return row or ()


def _pair(row: Any, field: str) -> tuple[float, int]:
    """Return log-probability and token id of one row of SGLang; NaN where it tells none."""
    found = _row(row, list, field, "log-probability and token id")
    if len(found) < 2 or not _is_number(found[0], or_none=True) or not isinstance(found[1], int):
        raise ServerError(f"expected rows of {field} to be log-probability and token id each, got {row!r:.80}")
    return math.nan if found[0] is None else float(found[0]), found[1]


def _entry(row: Mapping[str, Any], index: int) -> Mapping[str, Any] | None:
    """Return what a row tells of one token; None if it tells nothing of it."""
    found = row.get(str(index))
    if found is None:
        return None
    if not isinstance(found, Mapping) or not _is_number(found.get("logprob")) or not isinstance(found.get("rank"), int):
        raise ServerError(
            f"expected prompt_logprobs with a logprob and a rank for token {index}, got {found!r:.80}: without a rank"
            " nothing tells whether a token is the most probable one"
        )
    return found


def _is_number(value: Any, *, or_none: bool = False) -> bool:
    return (value is None and or_none) or (isinstance(value, int | float) and not isinstance(value, bool))


def _other_tokens(given: GivenText, theirs: Sequence[Any]) -> ServerError:
    return ServerError(
        f"expected log-probabilities of tokens {list(given.ids)} for {given.said!r:.80}, the server tells of "
        f"{theirs!r:.200}: pretrained= must be the checkpoint that the server serves"
    )
