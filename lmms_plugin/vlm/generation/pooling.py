"""Pooling of a prompt's hidden states while `generate` reads it, without storing them or running anything twice.

Nothing here depends on an architecture: the language model is the one transformers names, the image's positions are
those of the image token that the configuration names. Where questions share the encoding of an image, the pooled states
of the shared prefix are combined with those of each question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmms_plugin.selector.features import LAST_LAYER
from lmms_plugin.utils.image_positions import image_positions, image_token_of


class Pooled(NamedTuple):
    """Maximum of hidden states over parts of prompts.

    Attributes:
        image: (rows, width) over the positions of the image; −∞ where there is none.
        question: (rows, width) over the text after the image, without special tokens; −∞ where there is none.
        last: (rows, width) at the last position, from which the answer's first token is predicted.
    """

    image: Tensor
    question: Tensor
    last: Tensor

    def rows(self, index: Tensor) -> Pooled:
        """Return the indexed rows, repeated where the index repeats."""
        return Pooled(*(part[index.to(part.device)] for part in self))

    def followed_by(self, later: Pooled) -> Pooled:
        """Return these positions and later ones together."""
        return Pooled(
            torch.maximum(self.image.to(later.image.device), later.image),
            torch.maximum(self.question.to(later.image.device), later.question),
            later.last,
        )


@dataclass(frozen=True)
class Pooling:
    """Pooling of the hidden states of one model.

    Attributes:
        model: Any Hugging Face vision-language model.
        image_token: Id of the image placeholder token.
        special: Ids of tokens that are no text.
        layer: Layer, as in `lmms_plugin.selector.features.FeatureOrigin`.
    """

    model: Any
    image_token: int
    special: tuple[int, ...]
    layer: int = LAST_LAYER

    @classmethod
    def of(cls, model: Any, special: frozenset[int], layer: int) -> Pooling:
        """Set up for a loaded model.

        Raises:
            ValueError: The configuration names no image token, or there is no such layer.
        """
        image_token = image_token_of(model.config)
        if image_token is None:
            raise ValueError(f"features: the configuration of {type(model).__name__} does not name its image token")
        if layer != LAST_LAYER:
            layers = len(getattr(model.get_decoder(), "layers", ()))
            if not 0 <= layer < layers:
                raise ValueError(f"feature_layer must be -1 or from 0 to {layers - 1} for this model, got {layer}")
        return cls(model, image_token, tuple(sorted(special)), layer)

    @contextmanager
    def watching(self, inputs: Mapping[str, Tensor]) -> Iterator[list[Pooled]]:
        """Pool the hidden states of a batch of prompts.

        Args:
            inputs: Inputs of the `generate` called inside the context: `input_ids` and `attention_mask`, (rows,
                columns), of which the first columns may have been read earlier.

        Yields:
            A list to which the first forward pass adds its only element.
        """
        found: list[Pooled] = []

        def see(states: Tensor) -> None:
            handle.remove()
            found.append(self._pool(states, inputs["input_ids"], inputs["attention_mask"]))

        handle = self._attach(see)
        try:
            yield found
        finally:
            handle.remove()

    def _attach(self, see: Callable[[Tensor], None]) -> Any:
        decoder = self.model.get_decoder()
        if self.layer == LAST_LAYER:
            return decoder.register_forward_hook(lambda module, arguments, output: see(output[0]))
        return decoder.layers[self.layer].register_forward_pre_hook(
            lambda module, arguments, named: see(arguments[0] if arguments else named["hidden_states"]),
            with_kwargs=True,
        )

    def _pool(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Pooled:
        is_image = image_positions(input_ids, self.image_token)
        is_behind = is_image.flip(1).cumsum(1).flip(1) == 0
        special = torch.tensor(self.special, device=input_ids.device)
        is_question = is_behind & (attention_mask != 0) & ~torch.isin(input_ids, special)
        return Pooled(_largest(states, is_image), _largest(states, is_question), states[:, -1].clone())


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    """Return the maximum (rows, width) of states (rows, columns, width) under a mask, whose last columns they are."""
    mask = mask[:, -states.shape[1] :, None].to(states.device)
    return states.masked_fill(~mask, -torch.inf).amax(1)
