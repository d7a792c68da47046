"""The model that lmms-eval runs as `quant_gguf`: GGUF files in llama.cpp, whose server is started for the run."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.quant_backends.checkpoints.gguf import gguf_export
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_export import (
    TEXT_FILE,
    VISION_FILE,
    GgufModel,
    expect_exportable,
    export,
)
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import PROJECTOR, GgufFile, expect_gguf, is_later_part, read
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.utils import hashing, variables
from lmms_plugin.utils.messages import command_line
from lmms_plugin.utils.processes.launch_command import PORT
from lmms_plugin.vlm.contracts.responding import Responder
from lmms_plugin.vlm.served import options as served_options
from lmms_plugin.vlm.served.llamacpp import embedded_server
from lmms_plugin.vlm.served.llamacpp.gguf_options import OPTION_TYPES, GgufOptions
from lmms_plugin.vlm.served.model import QuantServed
from lmms_plugin.vlm.setting_up import chat_of

_OF_THE_SERVER = ("timeout", "retries", "mismatch", "launch_timeout", "launch_log")
"""Options of served models that this one takes, too."""


class GgufFiles(NamedTuple):
    """What is run.

    Attributes:
        text: File of the language model.
        vision: File of the vision tower and the connector.
        checkpoint: What processor and tokenizer come from, as `pretrained=` takes it.
        read: Function that writes the files if there are none, and tells what they are.
    """

    text: Path
    vision: Path
    checkpoint: str
    read: Callable[[], GgufModel]


class QuantGguf(QuantServed):
    """GGUF files in llama.cpp; a checkpoint that is none is written as such at the first request.

    Attributes:
        gguf: What the files are, by the types of their tensors; from the first request on.
    """

    gguf: GgufModel

    def __init__(self, **arguments: Any) -> None:
        """Check arguments, files that are there, and whether the checkpoint can be written as GGUF.

        Args:
            **arguments: see `ModelArguments` and `GgufOptions`.

        Raises:
            ValueError: an argument is unknown or impossible, the checkpoint cannot be written as GGUF, or a file is
                damaged or missing.
            ImportError: the extra `gguf` is not installed.
        """
        for library in ("gguf", "xllamacpp"):
            require(library, extra="gguf", user="quant_gguf")
        given = {name: value for name, value in arguments.items() if name not in OPTION_TYPES}
        passed = {name: served_options.OPTION_TYPES[name] for name in _OF_THE_SERVER}
        parsed = ModelArguments.parse(arguments, {**OPTION_TYPES, **passed})
        own = {field.name for field in fields(GgufOptions)}
        chosen = {name: value for name, value in parsed.options.items() if name in own and value is not None}
        options = GgufOptions(**chosen)
        if "bits" in arguments:
            raise ValueError("bits has no effect on a GGUF model: type= chooses how it is written (Q8_0, Q4_0, ...)")
        if "pretrained" not in arguments:
            raise ValueError("pretrained is missing: demo, a checkpoint, or a folder with GGUF files")
        self._files = files = files_of(parsed, options)
        words = [sys.executable, "-P", "-m", embedded_server.__name__]
        image_tokens = _image_tokens(files.checkpoint, parsed)
        words += [*options.server(files.text, files.vision, image_tokens), "--port", PORT]
        given |= {"launch": command_line(words), "concurrency": options.slots, "prompts": served_options.RENDERED}
        super().__init__(**given | {"pretrained": files.checkpoint})

    def make_responder(self) -> Responder:
        """Write the files if there are none, start the server, and ask a first question.

        Raises:
            ValueError: the files cannot be written, the server does not start, or it reads other prompts than the
                processor makes.
        """
        self.gguf = self._files.read()
        return super().make_responder()

    def figures(self) -> dict[str, Any]:
        """Return also the size of the files, as of models that are quantized here."""
        return {**super().figures(), **self.gguf.totals()}

    def account(self) -> dict[str, Any]:
        """Return also what the files are, by the types of their tensors."""
        return {**super().account(), "gguf": self.gguf.to_dict()}

    def _account(self) -> None:
        super()._account()
        if self.rank == 0:
            for file in self.gguf:
                logger.info("{}", file.table().splitlines()[-1])


class QuantGgufSimple(QuantGguf):
    """The same for lmms-eval's `--force_simple`."""

    is_simple = True


def files_of(arguments: ModelArguments, options: GgufOptions) -> GgufFiles:
    """Find the files of a model, or say where they will be written.

    Raises:
        ValueError: a file is missing, damaged, or one of several; or the checkpoint cannot be written.
    """
    path = Path(arguments.pretrained).expanduser()
    there = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if there:
        options.expect_nothing_to_write()
        folder = path.parent if path.is_file() else path
        named = {"gguf": options.gguf or (path.name if path.is_file() else None), "mmproj": options.mmproj}
        model = _found(folder, named)
        return GgufFiles(model.text.path, model.vision.path, options.processor or str(folder), lambda: model)
    for name in ("gguf", "mmproj", "processor"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} says nothing without GGUF files: there are none in {arguments.pretrained}")
    checkpoint, converter = arguments.find_checkpoint(), options.converter
    return _to_be_written(
        checkpoint, str(arguments.pretrained), options, None if converter is None else Path(converter).expanduser()
    )


def _found(folder: Path, named: dict[str, str | None]) -> GgufModel:
    """Read the two files of a folder: those that are named, else the only ones of their kind."""
    chosen = {kind: folder / name for kind, name in named.items() if name is not None}
    for file in chosen.values():
        expect_gguf(file)
    others = [file for file in sorted(folder.glob("*.gguf")) if file not in chosen.values() and not is_later_part(file)]
    read_ones = {kind: read(file) for kind, file in chosen.items()}
    # What is chosen already is not looked for.
    left = [read(file) for file in others] if len(read_ones) < len(named) else []
    for kind in named:
        if kind not in read_ones:
            read_ones[kind] = _only(
                [one for one in left if (one.architecture == PROJECTOR) == (kind == "mmproj")], kind, folder
            )
    text, vision = read_ones["gguf"], read_ones["mmproj"]
    if text.architecture == PROJECTOR or vision.architecture != PROJECTOR:
        raise ValueError(
            f"expected a language model as gguf= and a vision tower with its connector as mmproj=, got "
            f"{text.path.name} ({text.architecture}) and {vision.path.name} ({vision.architecture})"
        )
    return GgufModel(text, vision)


def _only(found: list[GgufFile], kind: str, folder: Path) -> GgufFile:
    if len(found) == 1:
        return found[0]
    what = "a language model" if kind == "gguf" else "a vision tower with its connector (mmproj)"
    got = ", ".join(one.path.name for one in found) or "none"
    raise ValueError(f"expected one GGUF file with {what} in {folder}, got {got}; name it with {kind}=")


def _to_be_written(checkpoint: str, named: str, options: GgufOptions, converter: Path | None) -> GgufFiles:
    """Say where a checkpoint will be written as GGUF, in the cache; what is there already is taken."""
    cache = variables.cache_folder("gguf")
    if cache is None:
        expect_exportable(checkpoint, options.choice, converter)
        unkept = tempfile.TemporaryDirectory(prefix="lmms-plugin-gguf-")
        folder = Path(unkept.name) / "model"
        written = partial(_written_for_once, unkept, checkpoint, folder, options, converter)
        return GgufFiles(folder / TEXT_FILE, folder / VISION_FILE, named, written)
    key = {
        "source": hashing.of_source(checkpoint, lambda _: None),
        "choice": asdict(options.choice),
        "converter": None if converter is None else hashing.of_path(converter),
        "code": hashing.of_code(Path(gguf_export.__file__).parent),
    }
    folder = cache / hashing.of_value(key)[:32]
    if (folder / TEXT_FILE).is_file():
        model = _kept(folder)
        return GgufFiles(model.text.path, model.vision.path, named, lambda: model)
    expect_exportable(checkpoint, options.choice, converter)
    written = partial(_written, checkpoint, folder, options, converter)
    return GgufFiles(folder / TEXT_FILE, folder / VISION_FILE, named, written)


def _written_for_once(
    unkept: tempfile.TemporaryDirectory[str],  # It lasts as long as what refers to it.
    checkpoint: str,
    folder: Path,
    options: GgufOptions,
    converter: Path | None,
) -> GgufModel:
    return export(checkpoint, folder, options.choice, converter=converter)


def _written(checkpoint: str, folder: Path, options: GgufOptions, converter: Path | None) -> GgufModel:
    try:
        return export(checkpoint, folder, options.choice, converter=converter, option=variables.CACHE)
    except (OSError, ValueError):
        # Another process may have written the same meanwhile.
        if not (folder / TEXT_FILE).is_file():
            raise
        return _kept(folder)


def _kept(folder: Path) -> GgufModel:
    try:
        return gguf_export.read_model(folder)
    except ValueError as error:
        raise ValueError(f"{error}: remove {folder}, which is then written again") from error


def _image_tokens(checkpoint: str, arguments: ModelArguments) -> tuple[int, int]:
    """Return the fewest and most tokens of an image by the processor's limits; -1 for each where it has none."""
    asked = ModelArguments.parse(
        {
            "pretrained": checkpoint,
            "min_pixels": arguments.min_pixels,
            "max_pixels": arguments.max_pixels,
            "trust_remote_code": arguments.trust_remote_code,
        }
    )
    chat, _ = chat_of(asked.find_checkpoint(), asked)
    return chat.image_token_limits() or (-1, -1)
