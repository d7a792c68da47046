"""Likelihoods of given texts, from servers that tell how probable the tokens of a prompt are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.utils import hashing
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

    Each request has a salt of its own. vLLM would else take the beginning of a text from its cache, for which some of
    its versions tell the log-probabilities of another request (issue 42019 there).

    Attributes:
        asking: writes requests.
    """

    asking: Asking

    def request(self, given: GivenText) -> dict[str, Any]:
        """Return the body of a request; see `Likelihoods`."""
        said = {"role": "assistant", "content": [{"type": "text", "text": given.said}]}
        body = self.asking.body([*messages_of(given.prompt, given.names), said], _ONE, probabilities=False)
        body |= {"add_generation_prompt": False, "continue_final_message": True, "prompt_logprobs": 0}
        return {**body, "cache_salt": hashing.of_value(body)}

    def ask(self, client: Client, given: GivenText, body: Mapping[str, Any]) -> Told:
        """Ask; see `Likelihoods`."""
        response = client.chat(body, given.images)
        entries = response.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise ServerError(
                "the server tells no log-probabilities of given texts (multiple choice, retrieval): of the engines "
                "known here vLLM and SGLang do; serve with one of these, or run the task with a model that is loaded "
                "here (quant_none, quant_prequantized, ...)"
            )
        count = len(given.ids)
        told = [_entry(entry, index) for entry, index in zip(entries[-count:], given.ids, strict=False)]
        if len(told) != count or None in told:
            raise _other_tokens(given, [list(entry or ()) for entry in entries[-count:]])
        found = [one for one in told if one is not None]
        logprobs = tuple(as_logprob(float(one["logprob"]), str(one.get("decoded_token"))) for one in found)
        return Told(response, logprobs, all(one.get("rank") == 1 for one in found))


@dataclass(frozen=True)
class NativeGenerate:
    """`/generate` of SGLang, whose chat API tells nothing of prompts: prompt and text are sent as one.

    Attributes:
        model: name under which it is served.
    """

    model: str

    def request(self, given: GivenText) -> dict[str, Any]:
        """Return the body of a request; see `Likelihoods`."""
        count = len(given.ids)
        return {
            "text": given.whole,
            "image_data": list(given.names),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            # The first token from there on has none.
            "logprob_start_len": given.expected.length - 1,
            "top_logprobs_num": 1,
            "stream": False,
            "rid": hashing.of_value([self.model, given.whole, list(given.names), count]),
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
        ids = [index for _, index, *_ in told[-count:]]
        if ids != list(given.ids):
            raise _other_tokens(given, ids)
        best = [row[0][1] if row else None for row in (meta.get("input_top_logprobs") or [])[-count:]]
        logprobs = tuple(
            as_logprob(math.nan if value is None else value, str(index)) for value, index, *_ in told[-count:]
        )
        return Told({"usage": {"prompt_tokens": meta.get("prompt_tokens")}}, logprobs, best == ids)


def likelihoods_of(engine: str | None, asking: Asking) -> Likelihoods | None:
    """Return how a server tells likelihoods of given texts; None where it cannot.

    Args:
        engine: that it names; None if unknown.
        asking: writes requests.
    """
    if engine == "sglang":
        return NativeGenerate(asking.model)
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


def _entry(entry: Any, index: int) -> Mapping[str, Any] | None:
    found = entry.get(str(index)) if isinstance(entry, Mapping) else None
    return found if isinstance(found, Mapping) and isinstance(found.get("logprob"), int | float) else None


def _other_tokens(given: GivenText, theirs: Sequence[Any]) -> ServerError:
    return ServerError(
        f"expected log-probabilities of tokens {list(given.ids)} for {given.said!r:.80}, the server tells of "
        f"{theirs!r:.200}: pretrained= must be the checkpoint that the server serves"
    )
