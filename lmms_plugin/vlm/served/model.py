"""The model that lmms-eval runs as `quant_served`: a checkpoint behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from loguru import logger
from PIL import Image

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.protocol.prompts import Prompt, PromptReader
from lmms_plugin.utils import files
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.utils.end_tokens import ends_of_checkpoint
from lmms_plugin.utils.processes.lent_servers import LentServer
from lmms_plugin.utils.processes.servers import Server, expect_free
from lmms_plugin.vlm.assembling import Assembler
from lmms_plugin.vlm.contracts.responding import Responder
from lmms_plugin.vlm.engine_facts import model_facts, prompting_facts
from lmms_plugin.vlm.generation.processor import Chat
from lmms_plugin.vlm.generation.special_tokens import special_tokens
from lmms_plugin.vlm.harness_model import HarnessModel
from lmms_plugin.vlm.jobs import Generation
from lmms_plugin.vlm.served.asking import Asking, RequestForm, Requests
from lmms_plugin.vlm.served.checking import PromptCheck
from lmms_plugin.vlm.served.client import Client, ServerError
from lmms_plugin.vlm.served.keeping import KeptAnswers
from lmms_plugin.vlm.served.launching import Launched, temporary_log
from lmms_plugin.vlm.served.likelihoods import likelihoods_of
from lmms_plugin.vlm.served.llamacpp.completion import RenderedAsking
from lmms_plugin.vlm.served.llamacpp.first_completion import probe_rendered
from lmms_plugin.vlm.served.llamacpp.forced_tokens import ForcedTokens
from lmms_plugin.vlm.served.load import Gate
from lmms_plugin.vlm.served.options import AUTO, CHAT, OPTION_TYPES, ServedOptions, expect_effect
from lmms_plugin.vlm.served.probing import LLAMACPP, STATED, Found, find, probe
from lmms_plugin.vlm.served.remote_engine import ServedEngine
from lmms_plugin.vlm.served.sent_images import Resizer, data_url
from lmms_plugin.vlm.served.tokens import Vocabulary
from lmms_plugin.vlm.setting_up import chat_of

Told = TypeVar("Told")
_FIRST_QUESTION = "What is in this picture?"
_FIRST_SIZE, _SQUARE = (224, 168), (224, 224)
"""Of the drawn picture. llama.cpp stretches or pads other images in its own way, which shows on the documents."""


class QuantServed(HarnessModel):
    """A checkpoint behind an OpenAI-compatible server (vLLM, SGLang, ...), whatever its weights are.

    Attributes:
        arguments: Arguments as given.
        options: Those arguments that served models alone have.
        chat: Processor of the checkpoint.
        reader: Reader of lmms-eval's messages.
        served: Model that the server says it serves.
        found: Abilities of the server, as a first question shows them.
    """

    def __init__(self, **arguments: Any) -> None:
        """Check arguments, load the checkpoint's processor and tokenizer, and ask a server that runs a first question.

        A server that is to be started (`launch`) is started and asked at the first request.

        Args:
            **arguments: Arguments, see `ModelArguments` and `ServedOptions`.

        Raises:
            ValueError: an argument is unknown or its value impossible, or the server does not answer as it should, or
                reads other prompts than the checkpoint's processor makes.
            FileNotFoundError: there is no such checkpoint.
        """
        super().__init__()
        self.arguments = ModelArguments.parse(arguments, OPTION_TYPES)
        self.options = ServedOptions.of(self.arguments)
        expect_effect(arguments)
        if "pretrained" not in arguments:
            raise ValueError("pretrained is missing: the checkpoint that is served, for its processor and tokenizer")
        self._path = self.arguments.find_checkpoint()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self._gate = Gate(self.options.concurrency)
        self._expect_startable()
        self.chat, self.reader = chat_of(self._path, self.arguments)
        if self.reader.raw or self.dialect.raw_prompt:
            raise ValueError(
                f"{self.arguments.pretrained} is asked without chat template, which the chat API of servers needs"
            )
        if self.options.command is None:
            # It costs a question, and tells early what else would end the run at its first one.
            self.make_ready()

    def make_responder(self) -> Responder:
        """Start the server, if that is asked for, and ask a first question.

        Raises:
            ValueError: the server cannot be started or does not answer as it should, or it reads other prompts than
                the checkpoint's processor makes.
        """
        self._launched = self._launch()
        self._client = self._connected(self.options.timeout)
        self.served = self._first(lambda client: find(client, self.options.model))
        self.found, engine = self._engine(self.chat, self.reader)
        self._check = engine.check
        self._kept = engine.kept
        assembler = Assembler(
            engine.traits,
            self.dialect,
            str(self.arguments.pretrained),
            warns=self.rank == 0,
            facts=self._facts() if self.rank == 0 else {},
            keeps_ids=self.arguments.parity,
            spell=self.chat.spell,
        )
        self._account()
        return Generation(engine, assembler, verbalised=self.arguments.verbalised, shows_progress=self.rank == 0)

    @property
    def dialect(self) -> Dialect:
        """How this model is asked for boxes."""
        return self.reader.dialect

    def figures(self) -> dict[str, Any]:
        """Return what of the server's doing goes into the results file: counts of prompts, compared and different."""
        return {
            "served_prompts_compared": self._check.checked,
            "served_prompts_not_compared": self._check.unchecked,
            "served_prompts_different": self._check.differing,
            "served_with_log_probabilities": float(self.found.form.listed is not None),
        }

    def clean(self) -> None:
        """End the connections, and forget the answers that were kept for going on."""
        super().clean()
        if "_client" not in vars(self):
            return
        self._client.end()
        if self._launched is not None:
            self._launched.end()
        if self._kept is not None:
            self._kept.remove()

    def account(self) -> dict[str, Any]:
        """Return what is known about what is served, each with who says it."""
        stated = {"method": self.options.method, "bits": self.arguments.bits}
        return {
            "pretrained": self.arguments.pretrained,
            "base_url": self._base_url,
            "launch": None if self.options.command is None else self.options.command.text,
            "log": None if self._launched is None else str(self._launched.server.log),
            "served": {**asdict(self.served), "told": dict(self.served.told)},
            "stated": {name: value for name, value in stated.items() if value is not None},
            "of_stated": STATED,
            "prompts": self._check.compares(self.found.response) or "not compared: the server tells nothing of them",
            "written": "rendered by the checkpoint's processor" if self.found.rendered else "by the chat API",
            "log_probabilities": self.found.form.listed is not None,
            "digits": self.found.digits,
            "token_ids": self.found.token_ids,
            "fields": "all" if self.found.form.extended else "OpenAI's alone: top_k and penalties are the server's",
        }

    def _facts(self) -> dict[str, str]:
        """Return the facts that decide the answers, for a comparison with another engine; "" for what is not told."""
        told = self.served.told
        place = next((str(told[name]) for name in ("root", "model", "model_path") if told.get(name)), "")
        return prompting_facts(self.chat, self.arguments) | model_facts(
            checkpoint=place,
            path=place,
            dtype=str(told.get("dtype") or ""),
            quantization=str(told.get("quantization") or told.get("model_ftype") or ""),
            software=f"{self.served.engine or ''} {self.served.version or ''}".strip(),
        )

    @property
    def _base_url(self) -> str:
        return self._launched.base_url if self._launched is not None else str(self.options.base_url)

    def _expect_startable(self) -> None:
        """Refuse what would keep the server from being started at the first request, as far as it shows now."""
        command = self.options.command
        if command is None or LentServer.of(os.environ, command) is not None:
            return
        if command.port:
            expect_free(command.port)
        if self.world_size > 1:
            raise ValueError(
                f"launch: expected one process, got {self.world_size}: one process asks as many questions at once as "
                "concurrency= says; or start the server yourself, and give its base_url"
            )

    def _launch(self) -> Launched | None:
        """Start the server, if that is asked for."""
        command = self.options.command
        if command is None:
            return None
        lent = LentServer.of(os.environ, command)
        if lent is not None:
            return Launched(lent, self.options.launch_timeout)
        chosen = self.options.launch_log
        log = temporary_log() if chosen is None else Path(chosen).expanduser()
        log.parent.mkdir(parents=True, exist_ok=True)
        return Launched.start(Server.of(command, log), self.options.launch_timeout, keeps_log=chosen is not None)

    def _connected(self, timeout: float) -> Client:
        options = self.options
        return Client(
            self._base_url,
            options.key,
            options.key_variable,
            timeout,
            options.retries,
            self._gate.busy,
            self._launched.expect_running if self._launched is not None else lambda: None,
        )

    def _first(self, ask: Callable[[Client], Told]) -> Told:
        """Ask something of the server, as soon as it answers if it was started here."""
        if self._launched is None:
            return ask(self._client)

        def within(seconds: float) -> Told:
            client = self._connected(min(seconds, self.options.timeout))
            try:
                return ask(client)
            finally:
                client.end()

        return self._launched.wait(within)

    def _engine(self, chat: Chat, reader: PromptReader) -> tuple[Found, ServedEngine]:
        """Ask the first question, and set up for what it shows."""
        config = config_of(self._path, trust_remote_code=self.arguments.trust_remote_code)
        ends = frozenset(ends_of_checkpoint(self._path, config, chat.tokenizer))
        vocabulary = Vocabulary(chat.tokenizer, ends, special_tokens(chat.tokenizer, ends))
        asking = Asking(
            self.served.model, RequestForm(), self.arguments.template_variables, tuple(vocabulary.numbers.ids)
        )
        check = PromptCheck(chat, stops=self.options.mismatch == "error")
        resizer = Resizer(chat.processor.image_processor)
        asked, found = self._first(lambda client: self._probed(client, asking, vocabulary, check, reader, resizer))
        kept = None
        if self.arguments.resume_folder:
            identity: dict[str, Any] = {
                "served": asdict(self.served),
                "checkpoint": self._path,
                "form": asdict(found.form),
            }
            identity |= {"rendered": True} if found.rendered else {}
            kept = KeptAnswers.of(self.arguments.resume_folder, identity)
            if kept.found and self.rank == 0:
                logger.info("{}: going on with {} answers in {}", self.served.model, kept.found, kept.file)
        return found, ServedEngine(
            self._client,
            asked,
            vocabulary,
            chat,
            reader,
            check,
            resizer,
            self._gate,
            found.token_ids,
            found.digits is not None,
            self.arguments.seed,
            self.arguments.samples,
            self.arguments.sample_temperature,
            kept,
            ForcedTokens(asked)
            if isinstance(asked, RenderedAsking)
            else likelihoods_of(self.served.engine, asking.with_form(found.form)),
            first_alone=not self.served.shares_at_once,
        )

    def _probed(
        self,
        client: Client,
        asking: Asking,
        vocabulary: Vocabulary,
        check: PromptCheck,
        reader: PromptReader,
        resizer: Resizer,
    ) -> tuple[Requests, Found]:
        """Ask the first question: by a rendered prompt where the server takes one, else by the chat API."""
        if self.options.prompts != CHAT:
            prompt, images = _first_question(reader, resizer, _SQUARE)
            rendered = probe_rendered(client, self.served, vocabulary, check, prompt, images)
            if rendered is not None:
                check.agrees(prompt, check.expected(prompt), rendered[1].response)
                return rendered
            if self.options.prompts != AUTO:
                raise ServerError(
                    f"prompts={self.options.prompts}: {client.root} is no llama.cpp that takes rendered prompts with "
                    "images (no media_marker in /props), or this processor writes an image in several pieces"
                )
        size = _SQUARE if self.served.engine == LLAMACPP else _FIRST_SIZE
        prompt, images = _first_question(reader, resizer, size)
        found = probe(client, asking, asking.shown(prompt, images), vocabulary)
        check.agrees(prompt, check.expected(prompt), found.response)
        return asking.with_form(found.form), found

    def _account(self) -> None:
        """Say, and keep as far as the user asks for it, what is served."""
        if self.rank != 0:
            return
        account = self.account()
        told = ", ".join(f"{name} {value}" for name, value in self.served.told.items())
        stated = ", ".join(f"{name} {value}" for name, value in account["stated"].items())
        logger.info(
            "{} at {}: {} {}{}{}; prompts compared by {}; digits from {}",
            self.served.model,
            self._base_url,
            self.served.engine or "an unknown engine",
            self.served.version or "",
            f", {told}" if told else "",
            f"; {stated} ({STATED})" if stated else "",
            account["prompts"],
            self.found.digits or "nowhere",
        )
        if self.arguments.report:
            place = Path(self.arguments.report).expanduser()
            place.parent.mkdir(parents=True, exist_ok=True)
            files.replace_text(place, json.dumps({"served": account}, indent=1) + "\n")


def _first_question(reader: PromptReader, resizer: Resizer, size: tuple[int, int]) -> tuple[Prompt, list[str]]:
    """Return a question about a drawn picture of a size, and the data URL of the picture."""
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    content = [{"type": "image", "url": picture}, {"type": "text", "text": _FIRST_QUESTION}]
    prompt = reader.read([{"role": "user", "content": content}], "a first question about a drawn image")
    return prompt, [data_url(resizer.seen(image)) for image in prompt.images]


class QuantServedSimple(QuantServed):
    """The same for lmms-eval's `--force_simple`."""

    is_simple = True
