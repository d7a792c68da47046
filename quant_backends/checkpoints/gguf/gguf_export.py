"""Writing of a checkpoint as GGUF: the language model in one file, vision tower and connector in another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lmms_plugin.quant_backends.checkpoints.gguf import idefics3_writer
from lmms_plugin.quant_backends.checkpoints.gguf.converter import convert, expect_converter
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_content import GgufContent, content_of
from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import GgufFile, read
from lmms_plugin.quant_backends.checkpoints.gguf.stored_weights import StoredWeights
from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import (
    K_QUANTS,
    K_QUANTS_EXTRA,
    TypeChoice,
    package,
)
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.utils.end_tokens import ends_of_checkpoint
from lmms_plugin.utils.files import new_folder
from lmms_plugin.utils.outputs import expect_free

TEXT_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
"""Names of what is written; other names are read as well."""

Contents = tuple[GgufContent, GgufContent]
FAMILIES: Mapping[str, Callable[[Any, Any, StoredWeights, tuple[int, ...]], Contents]] = {
    "idefics3": idefics3_writer.contents,
}
"""`model_type` of a checkpoint -> function that returns the contents of its two files."""


class GgufModel(NamedTuple):
    """A model's two files.

    Attributes:
        text: Language model.
        vision: Vision tower and connector.
    """

    text: GgufFile
    vision: GgufFile

    def totals(self) -> dict[str, float | int]:
        """Return the numbers to log beside results; only tensors of fewer than 16 bits count as quantized."""
        every = (*self.text.tensors, *self.vision.tensors)
        quantized = (*self.text.quantized, *self.vision.quantized) or every
        return {
            "bits_per_weight": 8 * sum(one.bytes for one in quantized) / sum(one.weights for one in quantized),
            "bits_per_model_weight": 8 * sum(one.bytes for one in every) / sum(one.weights for one in every),
            "bytes_after": sum(one.bytes for one in every),
            "quantized_layers": len(self.text.quantized) + len(self.vision.quantized),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**self.totals(), "files": [self.text.to_dict(), self.vision.to_dict()]}

    def table(self) -> str:
        """Return lines for the terminal."""
        return f"{self.text.table()}\n{self.vision.table()}"


def export(
    checkpoint: str,
    folder: str | Path,
    choice: TypeChoice,
    *,
    converter: Path | None = None,
    option: str = "save_quantized",
) -> GgufModel:
    """Write a checkpoint as GGUF into a new folder, whole or not at all.

    Args:
        checkpoint: Folder of the checkpoint, unquantized.
        folder: New or empty folder; it gets `model.gguf`, `mmproj.gguf`, and what the processor needs.
        choice: Types of the tensors.
        converter: llama.cpp's converter, for families that are not written here.
        option: Option by which the user named the folder, for messages.

    Raises:
        ValueError: The folder is taken, the family cannot be written, or a type does not fit.
        ImportError: The extra `gguf` is missing.
    """
    target, source = expect_free(folder, option), Path(checkpoint)
    config = expect_exportable(checkpoint, choice, converter)
    # Transformers' processors take seconds to import.
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    with new_folder(target) as unfinished, tempfile.TemporaryDirectory(dir=target.parent) as work:
        text, vision, choice = _contents(config, processor, source, choice, converter, Path(work))
        text.expect_writable(choice)
        vision.expect_writable(choice)
        text.write(unfinished / TEXT_FILE, choice)
        vision.write(unfinished / VISION_FILE, choice)
        config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        _generation_config(source, unfinished)
    return read_model(target)


def expect_exportable(checkpoint: str, choice: TypeChoice, converter: Path | None) -> Any:
    """Refuse what cannot be written as GGUF, as far as it shows without weights; return the checkpoint's config.

    Raises:
        ValueError: It is no folder, quantized already, or of a family that is not written.
        ImportError: The extra `gguf` is missing.
    """
    package("writing GGUF files")
    if {choice.language, choice.embedding, choice.output, choice.vision} & set(K_QUANTS):
        require("libgguf", extra=K_QUANTS_EXTRA, user="writing K-quants")
    if not Path(checkpoint).is_dir():
        raise ValueError(f"expected the folder of a checkpoint, got {checkpoint}: download it first")
    config = config_of(checkpoint)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{checkpoint} is quantized already; GGUF is written from unquantized weights")
    if converter is not None:
        expect_converter(converter)
    elif config.model_type not in FAMILIES:
        raise ValueError(
            f"{config.model_type}: this family is not written as GGUF here (only {', '.join(FAMILIES)} is); name "
            "llama.cpp's own converter with converter=PATH/convert_hf_to_gguf.py"
        )
    return config


def read_model(folder: Path) -> GgufModel:
    """Read what `export` wrote to a folder."""
    return GgufModel(read(folder / TEXT_FILE), read(folder / VISION_FILE))


def _contents(
    config: Any, processor: Any, source: Path, choice: TypeChoice, converter: Path | None, work: Path
) -> tuple[GgufContent, GgufContent, TypeChoice]:
    weights = StoredWeights(source)
    half = weights.is_half
    choice = choice if choice.vision else replace(choice, vision="F16" if half else "F32")
    if converter is not None:
        files = work / TEXT_FILE, work / VISION_FILE
        for file, vision in zip(files, (False, True), strict=True):
            convert(converter, source, file, "bf16" if half and not vision else "f32", vision=vision)
        return content_of(files[0]), content_of(files[1]), choice
    ends = ends_of_checkpoint(str(source), config, processor.tokenizer)
    main = processor.tokenizer.eos_token_id
    ordered = tuple(sorted(ends, key=lambda index: (index != main, index)))
    return *FAMILIES[config.model_type](config, processor.image_processor, weights, ordered), choice


def _generation_config(source: Path, folder: Path) -> None:
    name = "generation_config.json"
    if (source / name).is_file():
        (folder / name).write_bytes((source / name).read_bytes())
