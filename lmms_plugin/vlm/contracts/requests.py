"""lmms-eval's requests in one form, whichever of its two interfaces (simple or chat) they were made for.

lmms-eval 0.7 hands a model tuples, whose layout depends on the kind of request and on the interface:

================  =======================================================================
chat              context, doc_to_messages, options, document, task, split
simple            context, options, doc_to_visual, document, task, split
simple, rounds    context, options, doc_to_visual, doc_to_text, document, task, split
log-likelihood    context, continuation or doc_to_target, doc_to_visual, document, task, split
================  =======================================================================
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lmms_plugin.protocol.prompts import Prompt, PromptReader, RequestError, naming
from lmms_plugin.vlm.contracts.settings import GenerationSettings

Messages = Sequence[Mapping[str, Any]]


class Round(NamedTuple):
    """One turn of a task that asks again, knowing the earlier answers.

    Attributes:
        messages: what to ask now; None when the task has ended.
        answers: of the earlier rounds, as the task wants them kept.
        memory: whatever the task wants back in the next round.
    """

    messages: Messages | None
    answers: list[str]
    memory: Any


@dataclass(frozen=True)
class Request:
    """One thing a task wants from the model.

    Attributes:
        name: task and document, for messages to the user.
        place: task, and number of the document in it.
        options: the task's generation_kwargs; empty for a log-likelihood.
        target: the continuation to score, or a function from the document to it; None for generation.
        repeat: how many equal requests came before it in the same call.
        image: equal for requests that the dataset knows to be about one image; None where it does not tell.
    """

    name: str
    place: tuple[str, int]
    options: Mapping[str, Any]
    target: str | Callable[[Any], Any] | None
    repeat: int
    image: Hashable | None
    _document: Callable[[], Any]
    _first: Callable[[Any], Messages]
    _next: Callable[..., Any]

    def first(self) -> Messages:
        """Load the document and return its messages, images still as the dataset has them.

        Raises:
            RequestError: the dataset cannot decode the document.
        """
        with naming(self.name, "the document cannot be read"):
            return self._first(self._document())

    def next(self, index: int, answers: list[str], memory: Any) -> Round:
        """Return round `index` (from 1) of a task with several rounds."""
        with naming(self.name, "the document cannot be read"):
            payload = self._next(self._document(), round_idx=index, previous_output=answers, previous_round_info=memory)
        if not isinstance(payload, tuple):
            return Round(None, answers, memory)
        messages, ended, kept, memory = payload
        return Round(None if ended else messages, answers if kept is None else list(kept), memory)

    def continuation(self) -> str:
        """Return the text to score."""
        return self.target if isinstance(self.target, str) else str(self.target(self._document()))  # type: ignore[misc]

    def seed(self, seed: int, sample: int | None = None) -> int:
        """Return a seed of the request's own: the same whichever batch or process it falls into.

        Args:
            seed: of the run.
            sample: number of a further answer to the same request; None for the answer itself.
        """
        drawn = "" if sample is None else f"\nsample {sample}"
        digest = hashlib.sha256(f"{seed}\n{self.name}\n{self.repeat}{drawn}".encode()).digest()
        return int.from_bytes(digest[:8], "big")


def read(instances: Iterable[Any], documents: Mapping[str, Any]) -> list[Request]:
    """Bring lmms-eval's instances into one form.

    Args:
        instances: `lmms_eval.api.instance.Instance`, all of one call.
        documents: lmms-eval's `task_dict`: task -> split -> documents by index.
    """
    seen: Counter[tuple[Any, ...]] = Counter()
    requests = []
    for instance in instances:
        arguments = instance.args
        key = (*arguments[-3:], getattr(instance, "idx", 0))
        requests.append(_read(arguments, documents, seen[key]))
        seen[key] += 1
    return requests


def candidates_of(request: Request) -> tuple[Messages, list[str]]:
    """Load a request that names candidates; return its messages and them.

    Raises:
        RequestError: the document cannot be read, or names none.
    """
    messages = request.first()
    named = [message["candidates"] for message in messages if message.get("candidates")]
    if len(named) != 1 or not all(isinstance(text, str) and text.strip() for text in named[0]):
        raise RequestError(f"{request.name}: expected one message with a list of texts under 'candidates'")
    return messages, list(named[0])


def _read(arguments: tuple[Any, ...], documents: Mapping[str, Any], repeat: int) -> Request:
    if len(arguments) == 2:
        return _unconditional(*arguments, repeat=repeat)
    *rest, index, task, split = arguments

    def document() -> Any:
        return documents[task][split][index]

    name, place = f"task {task}, document {index}", (task, index)
    image = _image(documents, task, split, index)
    context = rest[0]
    if len(rest) == 3 and isinstance(rest[2], Mapping):
        _, ask, options = rest
        return Request(name, place, options, None, repeat, image, document, ask, ask)
    show = rest[2]

    def first(doc: Any) -> Messages:
        return visuals_and_text(show(doc), context)

    if isinstance(rest[1], Mapping):
        again = rest[3] if len(rest) == 4 else None
        return Request(name, place, rest[1], None, repeat, image, document, first, _rounds(again))
    return Request(name, place, {}, rest[1], repeat, image, document, first, _rounds(None))


def _image(documents: Mapping[str, Any], task: str, split: str, index: int) -> Hashable | None:
    key = getattr(documents[task][split], "image_key", None)
    return None if key is None else (task, split, key(index))


def _unconditional(context: str, continuation: str, *, repeat: int) -> Request:
    """Read the request of a metric that wants a choice's probability without any question."""
    return Request(
        f"choice {continuation!r}",
        ("", 0),
        {},
        continuation,
        repeat,
        None,
        lambda: None,
        lambda _: visuals_and_text((), context),
        _rounds(None),
    )


def _rounds(again: Callable[..., Any] | None) -> Callable[..., Any]:
    """Turn the simple interface's five values of a round into the chat interface's four."""

    def next_round(doc: Any, **state: Any) -> Any:
        payload = again(doc, **state) if again is not None else None
        if not isinstance(payload, tuple):
            return None
        visuals, text, ended, answers, memory = payload
        return (None if ended else visuals_and_text(visuals, text)), ended, answers, memory

    return next_round


def visuals_and_text(visuals: Iterable[Any] | None, text: str) -> list[dict[str, Any]]:
    """Return the message that lmms-eval's simple interface stands for: all visuals, then the text."""
    parts = [_visual(visual) for visual in visuals or ()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _visual(visual: Any) -> dict[str, Any]:
    if isinstance(visual, Image.Image):
        return {"type": "image", "url": visual}
    if isinstance(visual, str | Path):
        image = Path(visual).suffix.lower() in Image.registered_extensions()
        return {"type": "image" if image else "video", "url": str(visual)}
    if isinstance(visual, Mapping):
        return {"type": visual.get("type", "audio"), "url": visual.get("url", visual.get("path", visual))}
    raise RequestError(f"visuals must be PIL images, paths or mappings, got {type(visual).__name__}")


class Job(NamedTuple):
    """One prompt to answer.

    Attributes:
        messages: makes its messages; images are decoded only when it is called.
        request: what it belongs to.
        settings: how to generate.
    """

    messages: Callable[[], Messages]
    request: Request
    settings: GenerationSettings

    def prompt(self, reader: PromptReader) -> Prompt:
        """Read the messages.

        Raises:
            RequestError: the reader refuses them, or log-probabilities are wanted of a beam search, which has none.
        """
        prompt = reader.read(self.messages(), self.request.name)
        if prompt.wants_confidence and self.settings.num_beams > 1:
            raise RequestError(f"{prompt.name}: log-probabilities of the answer are asked for; beam search has none")
        return prompt
