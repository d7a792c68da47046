"""A first question to llama.cpp by a rendered prompt, which shows where images stand and what the server can tell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from loguru import logger

from lmms_plugin.protocol.prompts import Prompt
from lmms_plugin.vlm.generation.token_texts import decode
from lmms_plugin.vlm.served.checking import PromptCheck
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.llamacpp.completion import FORM, LISTED, RenderedAsking, text_added
from lmms_plugin.vlm.served.llamacpp.image_places import places
from lmms_plugin.vlm.served.probing import LLAMACPP, PROBE, Found, Served, optional
from lmms_plugin.vlm.served.tokens import Vocabulary


def probe_rendered(
    client: Client,
    served: Served,
    vocabulary: Vocabulary,
    check: PromptCheck,
    prompt: Prompt,
    images: Sequence[str],
) -> tuple[RenderedAsking, Found] | None:
    """Ask a question about an image, with the image in each place where it may stand, until the tokens are as expected.

    Args:
        client: of the server.
        served: what it says that it serves.
        vocabulary: of the checkpoint.
        check: with the checkpoint's processor.
        prompt: question about one image.
        images: data URLs of its images.

    Returns:
        What writes requests, and what the question has shown; None where the server takes no rendered prompts, or the
        processor writes an image in several pieces.

    Raises:
        ServerError: the server sees no images, or answers in a way that does not fit the checkpoint.
    """
    llama = served.engine == LLAMACPP
    props = client.get(f"{client.root}/props") if llama else optional(client, "props")
    marker = props.get("media_marker")
    if not isinstance(marker, str) or not marker:
        return None
    if not (props.get("modalities") or {}).get("vision"):
        raise ServerError(
            f"{client.root} serves {served.model} without a vision tower: start it with the model's mmproj (--mmproj)"
        )
    expected, chat = check.expected(prompt), check.chat
    image = getattr(chat.processor, "image_token_id", None)
    if image is None or expected.ids is None:
        return None
    read = partial(decode, chat.tokenizer)
    found = places(chat.ids(chat.text_of(prompt)), expected.ids, image, read, vocabulary.special.tokens)
    added, first = text_added(client, chat), None
    for place in found:
        asking = RenderedAsking(served.model, marker, place, added, chat, vocabulary.ends)
        response = asking.ask(client, asking.body(asking.shown(prompt, images), PROBE, digits=True), patient=False)
        shown = asking, _found(response, vocabulary, served.model)
        if response["usage"]["prompt_tokens"] == expected.length:
            return shown
        first = first or shown
    # None is as expected: the first goes on, and the comparison of prompts tells the difference.
    return first


def _found(response: dict[str, Any], vocabulary: Vocabulary, model: str) -> Found:
    choice = response["choices"][0]
    told = bool((choice.get("logprobs") or {}).get("content"))
    if not told:
        logger.warning("{}: the server gives no log-probabilities: everything about confidence is missing", model)
    vocabulary.read(choice, (), probabilities=told, digits=told)
    digits = f"top_logprobs ({LISTED})" if told else None
    return Found(FORM, response, True, digits, rendered=True)
