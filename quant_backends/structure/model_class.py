"""Which class of transformers a checkpoint is loaded as."""

from __future__ import annotations

from typing import Any


def class_of(config: Any) -> Any:
    """Return the class with `from_pretrained` for a configuration."""
    from transformers import AutoModelForImageTextToText, Blip2ForImageTextRetrieval

    return Blip2ForImageTextRetrieval if writes_nothing(config) else AutoModelForImageTextToText


def writes_nothing(config: Any) -> bool:
    """Return whether it is a retrieval checkpoint, which scores captions and writes none."""
    # Its type is that of the models that do write.
    return "Blip2ForImageTextRetrieval" in (config.architectures or ())
