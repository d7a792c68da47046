"""The arguments of a GGUF model: which files, or which types to write, and how llama.cpp's server runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import TypeChoice
from lmms_plugin.vlm.served.llamacpp.embedded_server import FLASH_ATTENTION, KV_TYPES


@dataclass(frozen=True)
class GgufOptions:
    """What a GGUF model takes besides the arguments of all models.

    Attributes:
        type: type in which the language model's matrices are written, for a checkpoint that is not GGUF yet; `Q8_0` by
            default.
        embedding_type: type of the token embedding; by default the same.
        output_type: type of the output projection; by default the same.
        vision_type: type of the vision tower; by default F32 or F16, as the checkpoint's precision is.
        converter: llama.cpp's `convert_hf_to_gguf.py`, or a program that runs it, for families that are not written
            here.
        gguf: name of the language model's file, where `pretrained` is a folder with several.
        mmproj: name of the file of vision tower and connector, likewise.
        processor: checkpoint that processor and tokenizer come from, where the folder of the GGUF files has none.
        threads: threads of the processor; by default as many as it has.
        slots: requests that the server answers at once; with more than one, answers may depend on their company.
        context: tokens of prompt and answer together, for each slot.
        kv_type: type of the key-value cache.
        flash_attention: `on`, `off` or `auto`.
        gpu_layers: layers on the GPU; -1 for all that fit, where the library is made for one.
    """

    type: str | None = None
    embedding_type: str | None = None
    output_type: str | None = None
    vision_type: str | None = None
    converter: str | None = None
    gguf: str | None = None
    mmproj: str | None = None
    processor: str | None = None
    threads: int | None = None
    slots: int = 1
    context: int = 4096
    kv_type: str = "f16"
    flash_attention: str = "auto"
    gpu_layers: int = -1

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("slots", 1), ("context", 1), ("gpu_layers", -1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, known in (("kv_type", KV_TYPES), ("flash_attention", FLASH_ATTENTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        _ = self.choice

    @property
    def choice(self) -> TypeChoice:
        """Return the types of tensors to write."""
        return TypeChoice(self.type or TypeChoice.language, self.embedding_type, self.output_type, self.vision_type)

    def expect_nothing_to_write(self) -> None:
        """Refuse arguments about writing where the files are there already.

        Raises:
            ValueError: One of them would have no effect.
        """
        for name in ("type", "embedding_type", "output_type", "vision_type", "converter"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect on files that are GGUF already: leave it out")

    def server(self, text: Path, vision: Path, image_tokens: tuple[int, int]) -> list[str]:
        """Return the arguments of the server but for its port.

        Args:
            text: File of the language model.
            vision: File of vision tower and connector.
            image_tokens: Fewest and most tokens of an image; -1 for what the file says.
        """
        values = {
            "model": text,
            "mmproj": vision,
            "alias": text.stem,
            "context": self.context,
            "slots": self.slots,
            "threads": self.threads or _processors(),
            "kv": self.kv_type,
            "flash-attention": self.flash_attention,
            "image-min-tokens": image_tokens[0],
            "image-max-tokens": image_tokens[1],
            "gpu-layers": self.gpu_layers,
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _processors() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        # Not every system tells.
        return os.cpu_count() or 1


OPTION_TYPES: Mapping[str, Any] = get_type_hints(GgufOptions)
"""What `ModelArguments.parse` is to let through."""
