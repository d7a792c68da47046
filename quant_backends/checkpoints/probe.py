"""Sanity check of a model that another tool quantized: one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmms_plugin.quant_backends.calibration.inputs import answered, to_model
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.quantization import tensor_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def expect_sound(model: PreTrainedModel, processor: Any) -> None:
    """Run a model once on an image and check its logits and its size.

    Layers without weights give NaN, and some libraries replace packed weights by dense ones at the first forward pass;
    neither raises an error.

    Raises:
        ValueError: Logits are not finite, or the weights have grown.
    """
    image, expression = scene(np.random.default_rng(0))
    before = tensor_bytes(model)
    asked = answered(model, processor, image, f"Where is {expression}?", "There.")
    output = model(**to_model(asked, model))
    # A retrieval model returns image-text scores instead.
    logits = output.logits if "logits" in output else output.logits_per_image
    if not torch.isfinite(logits).all():
        bad = int((~torch.isfinite(logits)).sum())
        raise ValueError(
            f"{bad} of {logits.numel()} logits are not finite for a plain image and question: the checkpoint does not "
            f"fit the model, or overflows in {model.dtype}"
        )
    after = tensor_bytes(model)
    if after > before:
        raise ValueError(
            f"weights took {before / 1e6:.1f} MB and take {after / 1e6:.1f} MB after one forward pass: the library "
            "that runs this format makes them dense, so that nothing measured would be that of a quantized model"
        )
