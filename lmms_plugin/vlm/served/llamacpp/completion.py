"""llama.cpp's `/completion`: prompts as the checkpoint's processor renders them, sent raw.

Its chat API renders messages with templates of its own kind, in which content with images is one string; for several
families that gives other tokens than transformers' templates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from lmms_plugin.protocol.prompts import Prompt, RequestError
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.generation.token_texts import cut, decode, token_texts
from lmms_plugin.vlm.served.asking import SEEDS, RequestForm
from lmms_plugin.vlm.served.checking import FIRST
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.llamacpp.image_places import ImagePlace
from lmms_plugin.vlm.served.tokens import BY_CHARACTERS

MARKER = "<__image_of_lmms_plugin__>"
"""Stands for an image until a request is sent: the server's own marker is another one after each start."""
_BASE64 = ";base64,"
LISTED = 64
"""Alternatives of a token that are asked for; the server lists as many as it is asked for."""
FORM = RequestForm(no_top_k=0, listed=LISTED, named=False)
_FINISHED = {"eos": "stop", "word": "stop", "limit": "length"}
"""How llama.cpp says that an answer ended -> how the chat API says it."""
_WHOLE = 2**16
_NEUTRAL: Mapping[str, Any] = {
    "min_p": 0.0,
    "top_n_sigma": -1.0,
    "typical_p": 1.0,
    "xtc_probability": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "adaptive_target": -1.0,
    "ignore_eos": False,
    # In the order of transformers: its temperature comes before what cuts off improbable tokens.
    "samplers": ["penalties", "temperature", "top_k", "top_p"],
    "post_sampling_probs": False,
}
"""Every setting of its samplers but those that a task chooses; its own defaults are not neutral."""


@dataclass(frozen=True)
class RenderedAsking:
    """Writes requests of `/completion`, and reads its responses.

    Attributes:
        model: name under which it is served, for messages.
        marker: text that stands for an image; the server draws a new one at each start.
        place: where images stand.
        added: text that the server puts before every prompt.
        chat: the checkpoint's processor.
        ends: ids of the tokens that end an answer.
    """

    model: str
    marker: str
    place: ImagePlace
    added: str
    chat: Chat
    ends: Collection[int]
    form: RequestForm = FORM
    _asked: Any = field(default_factory=count, init=False, repr=False, compare=False)

    def shown(self, prompt: Prompt, images: Sequence[str]) -> dict[str, Any]:
        """Return a prompt as the API takes it.

        Args:
            prompt: with a chat template.
            images: data URLs of its images, or what stands for them, in order.

        Raises:
            RequestError: it holds a video, or its text holds the placeholder of an image.
        """
        if prompt.videos:
            raise RequestError(f"{prompt.name}: videos are not sent to servers, only images and text are")
        text = self.chat.text_of(prompt)
        if self.place.count(text) != len(images) or MARKER in text:
            raise RequestError(
                f"{prompt.name}: expected the placeholder {self.place.found!r} in the rendered prompt for each of "
                f"{len(images)} images, got {self.place.count(text)}"
            )
        sent = self.place.marked(text, MARKER).removeprefix(self.added)
        return {"prompt_string": sent, "multimodal_data": [url.partition(_BASE64)[2] or url for url in images]}

    def body(
        self,
        shown: Mapping[str, Any],
        settings: GenerationSettings,
        *,
        seed: int = 0,
        probabilities: bool = True,
        digits: bool = False,
    ) -> dict[str, Any]:
        """Return the body of a request; see `Asking.body`."""
        sampling = settings.sampling
        body: dict[str, Any] = {
            "prompt": shown,
            "n_predict": settings.max_new_tokens,
            "temperature": sampling.temperature if sampling else 0.0,
            "top_p": sampling.top_p if sampling else 1.0,
            "top_k": sampling.top_k if sampling else 0,
            "repeat_penalty": settings.repetition_penalty,
            # Transformers penalises over the whole context.
            "repeat_last_n": 0 if settings.repetition_penalty == 1 else _WHOLE,
            "seed": seed % SEEDS,
            "stream": False,
            "cache_prompt": True,
            "return_tokens": True,
            # With one alternative the probability of the token itself comes.
            "n_probs": (LISTED if digits else 1) if probabilities else 0,
            **_NEUTRAL,
        }
        if settings.until:
            body["stop"] = list(settings.until)
        return body

    def unsent(self, settings: GenerationSettings) -> str:
        """Return "": the server has a field for every wish of a task."""
        return ""

    def ask(
        self,
        client: Client,
        body: Mapping[str, Any],
        images: Mapping[str, bytes] | None = None,
        *,
        patient: bool = True,
    ) -> dict[str, Any]:
        """Ask, and return the response in the form of the chat API.

        The ids of the first prompts come with it, from the server's own tokenizer.

        Raises:
            ServerError: there is no answer, or not the one that was asked for.
        """
        url = f"{client.root}/completion"
        text = body["prompt"]["prompt_string"].replace(MARKER, self.marker)
        body = {**body, "prompt": {**body["prompt"], "prompt_string": text}}
        bare = {name: image.partition(_BASE64.encode())[2] for name, image in (images or {}).items()}
        response = client.post(url, body, bare, patient=patient)
        if body["n_probs"] and body.get("stop") and self._lacks_probabilities(response, body["stop"]):
            # The token in which a stop begins loses its probability, although the beginning of its text is kept.
            body = {name: value for name, value in body.items() if name != "stop"}
            body["n_predict"] = len(response["tokens"])
            response = {**client.post(url, body, bare, patient=patient), "stop_type": "word"}
        expect_effect(response, body)
        answer = as_chat(response, self.ends)
        if next(self._asked) < FIRST:
            answer["prompt_token_ids"] = self._prompt_ids(client, body["prompt"], response["tokens_evaluated"])
        return answer

    def _lacks_probabilities(self, response: Mapping[str, Any], stop: Sequence[str]) -> bool:
        tokens = response.get("tokens")
        if response.get("stop_type") != "word" or not isinstance(tokens, list):
            return False
        kept = cut(token_texts(self.chat.tokenizer, tokens), stop)
        return len(response.get("completion_probabilities") or []) < len(kept)

    def _prompt_ids(self, client: Client, prompt: Mapping[str, Any], length: int) -> list[int]:
        """Return the ids of a prompt as the server makes them; those of images as our processor writes them."""

        def ids(text: str, *, special: bool) -> list[int]:
            body = {"content": text, "add_special": special, "parse_special": True}
            return list(client.post(f"{client.root}/tokenize", body)["tokens"]) if text or special else []

        parts = prompt["prompt_string"].split(self.marker)
        texts = [ids(part, special=number == 0) for number, part in enumerate(parts)]
        images = len(parts) - 1
        if not images:
            return texts[0]
        opened, closed = ids(self.place.opened, special=False), ids(self.place.closed, special=False)
        each = (length - sum(map(len, texts))) // images - len(opened) - len(closed)
        image = [*opened, *[self.chat.processor.image_token_id] * each, *closed]
        return [index for number, part in enumerate(texts) for index in (image if number else []) + part]


def expect_effect(response: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    """Refuse an answer for which the server took other settings than those that were sent.

    Raises:
        ServerError: it did; names the first of them.
    """
    used = response.get("generation_settings")
    if not isinstance(used, Mapping):
        return
    for name, sent in body.items():
        taken = used.get(name, sent)
        same = math.isclose(taken, sent, rel_tol=1e-6) if isinstance(sent, float) else taken == sent
        # A list of samplers names those alone that this build knows; a seed of another sign is the same seed.
        if not same and name not in ("prompt", "seed"):
            raise ServerError(f"{name}: the server was sent {sent!r} and took {taken!r}")


def as_chat(response: Mapping[str, Any], ends: Collection[int]) -> dict[str, Any]:
    """Return a response of `/completion` in the form of the chat API.

    Args:
        response: of the server.
        ends: ids of the tokens that end an answer; what follows the first one is dropped.

    Raises:
        ServerError: it is no whole answer.
    """
    tokens, kind = response.get("tokens"), response.get("stop_type")
    if not isinstance(tokens, list) or not tokens:
        raise ServerError(f"expected the ids of an answer's tokens from /completion, got {', '.join(response)}")
    if response.get("truncated"):
        raise ServerError(
            f"the answer was cut off after {len(tokens)} tokens because prompt and answer do not fit in the server's "
            "context: serve with a longer one (context=), or lower max_new_tokens"
        )
    entries = list(response.get("completion_probabilities") or [])
    end = next((place for place, index in enumerate(tokens) if index in ends), len(tokens) - 1)
    content = str(response.get("content", ""))
    if end < len(tokens) - 1:
        # The server ends at fewer tokens than the checkpoint.
        entries = entries[: max(0, len(entries) - (len(tokens) - 1 - end))]
        tokens, kind, content = tokens[: end + 1], "eos", ""
    choice: dict[str, Any] = {
        "message": {"role": "assistant", "content": content},
        "finish_reason": _FINISHED.get(str(kind)),
        "token_ids": tokens,
        BY_CHARACTERS: True,
        "logprobs": {"content": entries} if entries else None,
    }
    return {
        "choices": [choice],
        "usage": {"prompt_tokens": response.get("tokens_evaluated"), "completion_tokens": len(tokens)},
    }


def text_added(client: Client, chat: Chat) -> str:
    """Return the text that the server puts before every prompt, such as a token that begins it."""
    ids = client.post(f"{client.root}/tokenize", {"content": "", "add_special": True}, patient=False).get("tokens")
    return decode(chat.tokenizer, ids) if ids else ""
