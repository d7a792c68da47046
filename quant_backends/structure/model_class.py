"""Choice of the transformers class for a checkpoint."""

from __future__ import annotations

from typing import Any


def class_of(config: Any) -> Any:
    """Return the class with `from_pretrained` for a configuration."""
    from transformers import AutoModelForImageTextToText, Blip2ForImageTextRetrieval

    return Blip2ForImageTextRetrieval if writes_nothing(config) else AutoModelForImageTextToText


def writes_nothing(config: Any) -> bool:
    """Return whether it is a retrieval checkpoint, which scores captions and generates no text."""
    # Its model type is that of the generating models.
    return "Blip2ForImageTextRetrieval" in (config.architectures or ())
