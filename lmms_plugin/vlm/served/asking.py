"""What a server is asked: the body of a chat completion in which nothing is left to the server's defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.served.client import Client

MOST_LISTED = 20
"""Alternatives of a token that servers list at most."""
MOST_NAMED = 128
"""Tokens whose log-probabilities are asked for by id at most; a vocabulary may have a thousand numbers."""
SEEDS = 2**31
"""Seeds below this are taken everywhere."""


@dataclass(frozen=True)
class RequestForm:
    """Which fields a server takes and answers.

    Attributes:
        extended: Whether it takes what vLLM, SGLang and llama.cpp know beyond OpenAI's fields (`top_k`, `min_p`,
            `repetition_penalty`, ids of tokens, special tokens in texts).
        no_top_k: Value of `top_k` that means none.
        listed: Alternatives of each token (`top_logprobs`); None where it gives no log-probabilities.
        named: Whether it gives log-probabilities of tokens by their ids (`logprob_token_ids`).
    """

    extended: bool = True
    no_top_k: int = -1
    listed: int | None = MOST_LISTED
    named: bool = True

    @classmethod
    def all(cls) -> Iterator[RequestForm]:
        """Yield what is tried, richest first."""
        yield cls()
        yield cls(named=False)
        yield cls(named=False, no_top_k=0)
        for listed in (MOST_LISTED, 5, None):
            yield cls(extended=False, named=False, listed=listed)


class Requests(Protocol):
    """Writes requests for one served model, and gets answers in the form of the chat API.

    Attributes:
        form: of the server.
    """

    @property
    def form(self) -> RequestForm:
        """Which fields the server takes and answers."""

    def shown(self, prompt: Prompt, images: Sequence[str]) -> Any:
        """Return a prompt as the API takes it; see `messages_of`."""

    def body(
        self,
        shown: Any,
        settings: GenerationSettings,
        *,
        seed: int = 0,
        probabilities: bool = True,
        digits: bool = False,
    ) -> dict[str, Any]:
        """Return the body of a request; see `Asking.body`."""

    def ask(
        self,
        client: Client,
        body: Mapping[str, Any],
        images: Mapping[str, bytes] | None = None,
        *,
        patient: bool = True,
    ) -> dict[str, Any]:
        """Ask; see `Client.chat`."""

    def unsent(self, settings: GenerationSettings) -> str:
        """Say which wish of a task this server has no field for; "" if it has all."""


@dataclass(frozen=True)
class Asking:
    """Writes requests of the chat API for one served model.

    Attributes:
        model: Name under which it is served.
        form: Form of requests that the server takes.
        template_variables: Variables of the chat template besides the messages.
        number_ids: Ids of the tokens of digits, asked for by id where the server takes that.
    """

    model: str
    form: RequestForm
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    number_ids: Sequence[int] = ()

    def with_form(self, form: RequestForm) -> Asking:
        """The same for another form."""
        return replace(self, form=form)

    def shown(self, prompt: Prompt, images: Sequence[str]) -> list[dict[str, Any]]:
        """Return a prompt's messages; see `messages_of`."""
        return messages_of(prompt, images)

    def ask(
        self,
        client: Client,
        body: Mapping[str, Any],
        images: Mapping[str, bytes] | None = None,
        *,
        patient: bool = True,
    ) -> dict[str, Any]:
        """Ask; see `Client.chat`."""
        return client.chat(body, images, patient=patient)

    @property
    def names_numbers(self) -> bool:
        """Whether log-probabilities of digits are asked for by id."""
        return self.form.named and 0 < len(self.number_ids) <= MOST_NAMED

    def body(
        self,
        messages: Sequence[Mapping[str, Any]],
        settings: GenerationSettings,
        *,
        seed: int = 0,
        probabilities: bool = True,
        digits: bool = False,
    ) -> dict[str, Any]:
        """Return the body of a request.

        Args:
            messages: Messages as the API takes them.
            settings: Settings of generation.
            seed: Seed of sampling.
            probabilities: Whether log-probabilities are wanted, and the server has some.
            digits: Whether those of alternatives in a digit's place are wanted, too.
        """
        sampling = settings.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": settings.max_new_tokens,
            "temperature": sampling.temperature if sampling else 0.0,
            "top_p": sampling.top_p if sampling else 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "stream": False,
            "seed": seed % SEEDS,
        }
        if settings.until:
            body["stop"] = list(settings.until)
        if self.form.extended:
            top_k = sampling.top_k if sampling else 0
            body |= {"top_k": top_k or self.form.no_top_k, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False}
            body |= {"repetition_penalty": settings.repetition_penalty, "return_token_ids": True}
            body |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        if self.template_variables:
            body["chat_template_kwargs"] = dict(self.template_variables)
        if probabilities and self.form.listed is not None:
            body |= {"logprobs": True, "top_logprobs": self.form.listed if digits else 0}
            if self.form.extended:
                body["return_tokens_as_token_ids"] = True
            if digits and self.names_numbers:
                body["logprob_token_ids"] = list(self.number_ids)
        return body

    def unsent(self, settings: GenerationSettings) -> str:
        """Say which wish of a task this server has no field for; "" if it has all."""
        if self.form.extended:
            return ""
        top_k = settings.sampling.top_k if settings.sampling else 0
        wishes = {"top_k": top_k != 0, "repetition_penalty": settings.repetition_penalty != 1}
        return ", ".join(name for name, wished in wishes.items() if wished)


def messages_of(prompt: Prompt, urls: Sequence[str]) -> list[dict[str, Any]]:
    """Return a prompt's messages as the API takes them.

    Args:
        prompt: Prompt with a chat template.
        urls: Addresses of its images, in order.

    Raises:
        RequestError: it holds a video.
    """
    if prompt.videos:
        raise RequestError(f"{prompt.name}: videos are not sent to servers, only images and text are")
    left = iter(urls)

    def part(of: Mapping[str, Any]) -> dict[str, Any]:
        if of["type"] == "image":
            return {"type": "image_url", "image_url": {"url": next(left)}}
        return {"type": "text", "text": of["text"]}

    return [{"role": one["role"], "content": [part(of) for of in one["content"]]} for one in prompt.messages]
