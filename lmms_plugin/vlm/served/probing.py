"""What is served, by the server's own account, and what the server can tell: found out before the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loguru import logger
from packaging.version import InvalidVersion, Version

from lmms_plugin.utils.suggest import near
from lmms_plugin.vlm.contracts.settings import GenerationSettings
from lmms_plugin.vlm.served.asking import Asking, RequestForm
from lmms_plugin.vlm.served.checking import counted
from lmms_plugin.vlm.served.client import Client, Passing, RequestRefused, ServerError
from lmms_plugin.vlm.served.tokens import Vocabulary

PROBE = GenerationSettings(max_new_tokens=4)
LLAMACPP = "llamacpp"
STATED = "stated, not verified"
_SHARING = (0, 11)
"""Release of vLLM since which requests that come together share prefixes."""


@dataclass(frozen=True)
class Served:
    """What a server says that it serves.

    Attributes:
        model: Name of the model on the server.
        engine: `vllm`, `sglang`, ...; None where it does not tell.
        version: Version of the engine.
        told: Further facts that it tells: dtype, quantization, longest context, which log-probabilities.
    """

    model: str
    engine: str | None = None
    version: str | None = None
    told: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @property
    def shares_at_once(self) -> bool:
        """Whether requests that come together share the beginning of their prompts, too.

        The engine of vLLM enters blocks into its cache of prefixes when it schedules them, so that a request finds
        those of another in the same step. The older engine, which entered what was computed, is gone since 0.11. Of
        other engines it is not known here.
        """
        if self.engine != "vllm":
            return False
        try:
            return Version(self.version or "").release >= _SHARING
        except InvalidVersion:
            return False


def find(client: Client, asked: str | None) -> Served:
    """Ask what is served.

    Args:
        client: Client of the server.
        asked: Name of the model there; None for the only one.

    Raises:
        Passing: no server answers, or it serves none yet.
        ServerError: it does not serve that model, or several of which none was named.
    """
    try:
        listed = _entries(client.get(f"{client.base_url}/models"))
    except RequestRefused as error:
        # An API without this list may serve the model all the same.
        if asked is None or error.status not in (404, 405, 501):
            raise
        listed = [{"id": asked}]
    names = [entry["id"] for entry in listed]
    if not names:
        # A router has none until the first of its servers is up.
        raise Passing(f"{client.base_url} serves no model")
    if asked is not None and asked not in names:
        raise ServerError(
            f"model: {client.base_url} serves no {asked!r}{near(asked, names)} (it serves {', '.join(names)})"
        )
    if asked is None and len(names) != 1:
        raise ServerError(f"{client.base_url} serves {len(names)} models ({', '.join(names)}): name one with model=")
    entry = next(entry for entry in listed if entry["id"] == (asked or names[0]))
    return _described(client, entry)


def _entries(response: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    data = response.get("data")
    if not isinstance(data, list):
        raise ServerError(f"expected a list of models under data, got {', '.join(response) or 'nothing'}")
    return [entry for entry in data if isinstance(entry, Mapping) and isinstance(entry.get("id"), str)]


def _described(client: Client, entry: Mapping[str, Any]) -> Served:
    owner = entry.get("owned_by")
    engine = owner if owner in ("vllm", "sglang", LLAMACPP, "lmdeploy") else None
    told: dict[str, Any] = {"max_model_len": entry.get("max_model_len"), "root": entry.get("root")}
    version = optional(client, "version").get("version")
    if engine in ("vllm", None):
        config = optional(client, "server_info?config_format=json").get("vllm_config") or {}
        told |= _of_vllm(config) if isinstance(config, Mapping) else {}
    if engine == "sglang":
        info = optional(client, "get_server_info")
        version = info.get("version", version)
        told |= {name: info.get(name) for name in ("dtype", "quantization", "model_path")}
    if engine == LLAMACPP:
        props = optional(client, "props")
        version = props.get("build_info", version)
        told |= {name: props.get(name) for name in ("model_path", "model_ftype")}
    plain = {name: value for name, value in told.items() if isinstance(value, str | int | float | bool)}
    return Served(entry["id"], engine, None if version is None else str(version), plain)


def _of_vllm(config: Mapping[str, Any]) -> dict[str, Any]:
    """What matters of vLLM's configuration, which holds it by parts."""
    model = config.get("model_config")
    model = model if isinstance(model, Mapping) else {}
    names = ("model", "dtype", "quantization", "max_model_len", "logprobs_mode", "max_logprobs", "generation_config")
    told = {name: model.get(name) for name in names if name in model}
    if "quantization" in model and model["quantization"] is None:
        told["quantization"] = "none"
    return told


def optional(client: Client, path: str) -> dict[str, Any]:
    """Fetch a page of a server's that need not be there; nothing if it is not."""
    try:
        return client.get(f"{client.root}/{path}")
    except ServerError:
        return {}


@dataclass(frozen=True)
class Found:
    """What a first question has shown.

    Attributes:
        form: Form of requests.
        response: Response to the request.
        token_ids: Whether ids of an answer's tokens come with it, log-probabilities or not.
        digits: Source of alternatives of digits: `logprob_token_ids`, `top_logprobs (N)`, or none.
        rendered: Whether prompts are sent as the checkpoint's processor renders them, and not as messages.
    """

    form: RequestForm
    response: Mapping[str, Any]
    token_ids: bool
    digits: str | None
    rendered: bool = False


def probe(
    client: Client,
    asking: Asking,
    messages: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
) -> Found:
    """Ask a question about an image, with fewer fields until the server takes them, and look at what came back.

    Args:
        client: Client of the server.
        asking: Writer of requests.
        messages: Messages of the question.
        vocabulary: Vocabulary of the checkpoint.

    Raises:
        ServerError: the server answers none of them, or in a way that does not fit the checkpoint.
    """
    form, response = _accepted(
        lambda form: client.chat(asking.with_form(form).body(messages, PROBE, digits=True), patient=False)
    )
    asking = asking.with_form(form)
    choice = response["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    if not entries and form.listed is not None:
        form = replace(form, listed=None, named=False)
    named = bool(entries) and asking.names_numbers and all(_names_all(entry, asking, vocabulary) for entry in entries)
    listed = min((len(entry.get("top_logprobs") or []) for entry in entries), default=0)
    if form.listed is not None and not named:
        form = replace(form, named=False, listed=form.listed if listed else 0)
    written = counted(response, "completion_tokens")
    vocabulary.read(choice, (), probabilities=form.listed is not None, digits=named or listed > 0, written=written)
    if form.listed is None:
        logger.warning(
            "{}: the server gives no log-probabilities of its answers: accuracy is measured, and everything about "
            "confidence is missing",
            asking.model,
        )
    digits = "logprob_token_ids" if named else f"top_logprobs ({listed})" if listed else None
    return Found(form, response, isinstance(choice.get("token_ids"), list), digits if form.listed is not None else None)


def _accepted(ask: Callable[[RequestForm], dict[str, Any]]) -> tuple[RequestForm, dict[str, Any]]:
    refusal: RequestRefused | None = None
    for form in RequestForm.all():
        try:
            return form, ask(form)
        except RequestRefused as error:
            if error.status not in (400, 422):
                raise
            refusal = error
    assert refusal is not None
    raise refusal


def _names_all(entry: Mapping[str, Any], asking: Asking, vocabulary: Vocabulary) -> bool:
    told = {vocabulary.candidate(one).id for one in entry.get("top_logprobs") or []}
    return told.issuperset(asking.number_ids)
