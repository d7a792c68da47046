"""Likelihoods of given texts from llama.cpp, which tells nothing of the tokens of a prompt.

A grammar of one sequence of tokens makes the server generate just these; the log-probabilities that come with them are
those before sampling, which no grammar touches. It takes one request, and as long as generating the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.likelihoods import GivenText, Told
from lmms_plugin.vlm.served.llamacpp.completion import RenderedAsking
from lmms_plugin.vlm.served.tokens import as_logprob


@dataclass(frozen=True)
class ForcedTokens:
    """Likelihoods by forced tokens.

    Attributes:
        asking: Writes requests.
    """

    asking: RenderedAsking

    def request(self, given: GivenText) -> dict[str, Any]:
        """Return the body of a request; see `Likelihoods`."""
        settings = GenerationSettings(max_new_tokens=len(given.ids))
        grammar = " ".join(f"<[{index}]>" for index in given.ids)
        return {
            **self.asking.body(self.asking.shown(given.prompt, given.names), settings),
            "grammar": f"root ::= {grammar}",
        }

    def ask(self, client: Client, given: GivenText, body: Mapping[str, Any]) -> Told:
        """Ask; see `Likelihoods`."""
        if set(given.ids) & set(self.asking.ends):
            raise ServerError(
                f"{given.said!r:.80} holds a token that ends an answer, which llama.cpp cannot be forced to"
            )
        response = self.asking.ask(client, body, given.images)
        choice = response["choices"][0]
        entries = (choice["logprobs"] or {}).get("content") or []
        told = [entry.get("id") for entry in entries]
        if choice["token_ids"] != list(given.ids) or told != list(given.ids):
            raise ServerError(
                f"expected log-probabilities of tokens {list(given.ids)} for {given.said!r:.80}, the server tells of "
                f"{told!r:.200} (parts of a character have none): run this task with a model that is loaded here"
            )
        logprobs = tuple(as_logprob(float(entry["logprob"]), str(entry.get("token"))) for entry in entries)
        best = [(entry.get("top_logprobs") or [{}])[0].get("id") for entry in entries]
        usage = {"prompt_tokens": response["usage"]["prompt_tokens"] + len(given.ids)}
        ids = response.get("prompt_token_ids")
        read = {"usage": usage} if ids is None else {"usage": usage, "prompt_token_ids": [*ids, *given.ids]}
        return Told(read, logprobs, best == list(given.ids))
