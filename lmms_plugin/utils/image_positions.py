"""Which positions of a sequence are those of images: the one rule, for caches, calibration, layers and features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_TYPE = 1
"""What processors write at image positions into `mm_token_type_ids`."""


def image_token_of(config: Any) -> int | None:
    """Return the id of the image placeholder token that a configuration names; None if it names none."""
    found = getattr(config, "image_token_id", None)
    return None if found is None else int(found)


def image_positions(input_ids: Tensor, image_token: int | None, marked: Tensor | None = None) -> Tensor:
    """Return which positions hold a part of an image.

    The markers around an image, padding and new tokens are text.

    Args:
        input_ids: (..., columns) ids, image placeholders included.
        image_token: Id of the placeholder; None if the model names none: then no position is one of an image.
        marked: (..., columns) `mm_token_type_ids`, where the processor marks image positions itself.

    Returns:
        (..., columns) bool.
    """
    if marked is not None:
        return marked == IMAGE_TYPE
    # No vocabulary has the id -1.
    return input_ids == (-1 if image_token is None else image_token)
