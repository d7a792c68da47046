"""Chat templates: the choice of a checkpoint's template, and checks that it passes on images and variables."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.protocol.plain_prompts import template_for

DEFAULT = "default"
_WORDS = "some words of no other use"
_REMEDY = "put the template of its family into the folder as chat_template.jinja"


def is_for(processor: Any, dialect: Dialect) -> bool:
    """Return whether a family is expected to have a chat template; others are asked in plain words."""
    return template_for(processor) is None and not dialect.raw_prompt


def adopt(processor: Any, dialect: Dialect, name: str) -> None:
    """Let a processor without a chat template use its tokenizer's, which it ignores by itself.

    Args:
        processor: Processor of any image-text-to-text checkpoint. Families that are asked in plain words stay as they
            are: their tokenizer's template is that of its language model.
        dialect: Dialect of the checkpoint.
        name: Name of the checkpoint, for messages.

    Raises:
        ValueError: There are several templates and none of them is the default.
    """
    if not is_for(processor, dialect):
        return
    own = getattr(processor, "chat_template", None)
    found = own or getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if isinstance(found, Mapping) and DEFAULT not in found:
        if len(found) != 1:
            raise ValueError(f"{name}: expected a chat template named {DEFAULT!r} among several, got {sorted(found)}")
        (found,) = found.values()
    if found is not own:
        processor.chat_template = found


def text_of(processor: Any) -> str | None:
    """Return the template in use; None where there is none."""
    template = getattr(processor, "chat_template", None)
    return template[DEFAULT] if isinstance(template, Mapping) else template


def expect_variables(processor: Any, variables: Mapping[str, Any], name: str) -> None:
    """Check that a chat template uses the variables that it will be given.

    Args:
        processor: Processor of the checkpoint.
        variables: Variables by name.
        name: Name of the checkpoint, for messages.

    Raises:
        ValueError: There is no template, it does not use one of them, or one is not for the user to set.
    """
    template = text_of(processor)
    taken = {"messages", *inspect.signature(processor.apply_chat_template).parameters}
    for variable in variables:
        if template is None:
            raise ValueError(f"{variable}: {name} is asked without a chat template, which alone reads it; leave it out")
        if variable in taken:
            raise ValueError(f"template_args: {variable} is set by this package; leave it out")
        if not re.search(rf"\b{re.escape(variable)}\b", template):
            raise ValueError(
                f"{variable}: the chat template of {name} knows no such variable; leave it out, or name a model whose "
                "template does"
            )


def expect_images_shown(processor: Any, variables: Mapping[str, Any], name: str) -> None:
    """Check that a chat template turns an image into a placeholder and keeps words unchanged.

    A language model's own template takes texts alone: a message with an image gives an error, a printed list, or the
    words without the image.

    Raises:
        ValueError: The template does something else.
    """
    words = {"type": "text", "text": _WORDS}
    try:
        shown, bare = (
            str(
                processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, **variables
                )
            )
            for content in ([{"type": "image"}, words], [words])
        )
    except (TypeError, ValueError, TemplateError) as error:
        raise ValueError(f"{name}: its chat template takes no image with a text ({error}); {_REMEDY}") from error
    if _WORDS not in shown.casefold() or "'type'" in shown:
        raise ValueError(f"{name}: its chat template is for texts alone, and prints a list of parts; {_REMEDY}")
    if shown == bare:
        raise ValueError(f"{name}: its chat template drops images; {_REMEDY}")
