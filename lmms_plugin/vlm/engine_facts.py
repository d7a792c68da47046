"""Facts about an engine that decide its answers: what was loaded, in which precision, and how prompts are made.

They travel with one answer of each task (`Response.engine`), because lmms-eval's results file takes numbers only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.protocol import chat_templates
from lmms_plugin.protocol.traces import short
from lmms_plugin.utils import hashing
from lmms_plugin.vlm.generation.processor import Chat


def prompting_facts(chat: Chat, arguments: ModelArguments) -> dict[str, str]:
    """Return the facts about prompts and images, which come from the checkpoint's processor and the user.

    Returns:
        `template`: digest of the chat template and its variables; `system`: digest of the system prompt, "" for none;
        `pixels`: the image processor's sizes as JSON.
    """
    template = chat_templates.text_of(chat.processor) or ""
    variables = json.dumps(dict(chat.template_variables), sort_keys=True, default=str)
    system = arguments.read_system_prompt()
    return {
        "template": short(template + variables) if template else "",
        "system": short(system) if system else "",
        "pixels": _sizes(getattr(chat.processor, "image_processor", None)),
    }


def _sizes(images: Any) -> str:
    names = ("size", "min_pixels", "max_pixels", "crop_size", "do_image_splitting", "max_patches")
    given = {name: _plain(getattr(images, name, None)) for name in names}
    return json.dumps({name: value for name, value in given.items() if value is not None}, sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """Return a size as a mapping of its own entries: it is a mapping or a dataclass, by release of transformers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: entry for name, entry in asdict(value).items() if entry is not None}
    return value


def weights_of(path: str | None) -> str:
    """Return a digest of the weights at a path; "" where there is no folder with weights."""
    if not path or not Path(path).is_dir():
        return ""
    try:
        return hashing.of_weights(Path(path))[:12]
    except FileNotFoundError:
        return ""


def model_facts(*, checkpoint: str, path: str | None, dtype: str, quantization: str, software: str) -> dict[str, str]:
    """Return the facts about a model.

    Args:
        checkpoint: Name of the checkpoint; "" if unknown.
        path: Folder of its files, if they are on this machine.
        dtype: Data type of the arithmetic; "" if unknown.
        quantization: Method and bits, `none` for none; "" if unknown.
        software: Name and version of what runs the model; "" if unknown.
    """
    return {
        "checkpoint": checkpoint,
        "weights": weights_of(path),
        "dtype": dtype.removeprefix("torch."),
        "quantization": quantization,
        "software": software,
    }
