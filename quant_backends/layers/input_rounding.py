"""Rounding of a layer's inputs at run time: which format, and what shares a scale. The one place that emulates it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmms_plugin.quant_backends.formats.codec import EncodedTensor, encode, fake_quantize, find_global_scale, find_scale
from lmms_plugin.quant_backends.formats.entries import FORMATS, NumberFormat, format_of
from lmms_plugin.quant_backends.layers.modalities import MODALITIES

TOKEN, BLOCK, TENSOR, MODALITY = "token", "block", "tensor", "modality"
GRANULARITIES = (TOKEN, BLOCK, TENSOR, MODALITY)
STATIC = (TENSOR, MODALITY)
"""Granularities whose scales come from calibration."""
GROUP = 128
"""Columns of a block where the format has none, as in DeepSeek-V3's FP8, whose weights have blocks of 128 by 128."""


@dataclass(frozen=True)
class InputRounding:
    """Rounding of the inputs of a linear layer.

    Attributes:
        name: Name of the format.
        granularity: ``token``: each row by its own largest magnitude; ``block``: each run of columns of a row by its
            own; ``tensor``: all inputs by one static scale, found in calibration; ``modality``: by one static scale
            for image tokens and one for all others (MQuant, arXiv:2502.00425).
        static: Whether numbers from calibration are needed: the scales of ``tensor`` and ``modality``, or the global
            scale of a format that has one. Without it each token has a global scale of its own.
        group_size: Columns of a block where the format has none; None for `GROUP`.
    """

    name: str
    granularity: str
    static: bool
    group_size: int | None = None

    @classmethod
    def of(cls, name: str, granularity: str | None = None, *, calibrated: bool = False) -> InputRounding:
        """Return the rounding that a user asks for.

        Args:
            name: Name of the format.
            granularity: One of `GRANULARITIES`; None for blocks where the format has some, else tokens.
            calibrated: Whether calibration inputs will be seen, from which static scales can come.

        Raises:
            ValueError: No such format or granularity, the format is none for inputs, or a static scale has no source.
        """
        form = format_of(name)
        if form.block[0] != 1 or not form.symmetric:
            raise ValueError(
                f"activation_format={name} is a format of weights; inputs take {', '.join(input_formats())} with"
                f" activation_granularity of {', '.join(GRANULARITIES)}"
            )
        own = form.block[1] is not None
        granularity = granularity or (BLOCK if own else TOKEN)
        if granularity not in GRANULARITIES:
            raise ValueError(f"activation_granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if own and granularity != BLOCK:
            raise ValueError(
                f"activation_format={name} scales blocks of {form.block[1]} columns, not each {granularity}; leave out"
                " activation_granularity"
            )
        if granularity in STATIC and not calibrated:
            raise ValueError(
                f"activation_granularity={granularity} takes a static scale from calibration inputs, of which this"
                " method sees none; gptq, awq and mbq do, or use token"
            )
        return cls(name, granularity, calibrated and (granularity in STATIC or form.global_scale))

    @property
    def format(self) -> NumberFormat:
        """Return the format, with the blocks of this granularity."""
        form = FORMATS[self.name]
        width = form.block[1] or self.group_size or GROUP if self.granularity == BLOCK else None
        # As kernels do (vLLM's, torch's), integers leave out the lowest code, so that the range is symmetric.
        reach = float((1 << (form.bits - 1)) - 1) if form.element.integer else None
        return replace(form, block=(None if self.granularity == TENSOR else 1, width), reach=reach)

    @property
    def by_modality(self) -> bool:
        """Return whether image tokens have a scale of their own."""
        return self.granularity == MODALITY

    @property
    def of_one_modality(self) -> InputRounding:
        """Return the rounding of a layer that sees inputs of one kind."""
        return replace(self, granularity=TENSOR) if self.by_modality else self

    @property
    def static_shape(self) -> tuple[int, ...]:
        """Return the shape of the static number: one, or one for each of `MODALITIES`."""
        return (len(MODALITIES),) if self.by_modality else ()

    @property
    def label(self) -> str:
        """Return a few words for reports."""
        if self.format.global_scale:
            return f"{self.name} inputs, {'static' if self.static else 'per-token'} global scale"
        return f"{self.name} inputs per {self.granularity}{'' if self.group_size is None else f' of {self.group_size}'}"

    def static_scale(self, largest: Tensor) -> Tensor:
        """Return the static number, float32, of inputs whose largest magnitude over all of calibration is given.

        Args:
            largest: (), or (modalities,) in the order of `MODALITIES`; the result has its shape.
        """
        if self.format.global_scale:
            return find_global_scale(largest, self.format)
        return find_scale(largest.float().view(-1, 1, 1), self.format).view(largest.shape)

    def encode(self, rows: Tensor, static: Tensor | None = None, is_image: Tensor | None = None) -> EncodedTensor:
        """Return rounded inputs as codes and scales; see `round`."""
        return encode(rows, self.format, **self._scales(static, is_image))

    def round(self, rows: Tensor, static: Tensor | None = None, is_image: Tensor | None = None) -> Tensor:
        """Return inputs after rounding.

        Args:
            rows: (rows, columns) float32.
            static: Number from `static_scale`, for a static rounding.
            is_image: (rows,) bool, which rows are image tokens, where modalities are scaled apart.

        Returns:
            (rows, columns) float32.

        Raises:
            ValueError: The static scale is missing, or what rows are.
        """
        if self.format.global_scale and not self.static:
            # A matrix of one row each.
            return fake_quantize(rows.unsqueeze(-2), self.format).squeeze(-2)
        return fake_quantize(rows, self.format, **self._scales(static, is_image))

    def _scales(self, static: Tensor | None, is_image: Tensor | None) -> dict[str, Tensor]:
        if not self.static:
            return {}
        if static is None:
            raise ValueError(f"{self.label}: the static scale that calibration finds is missing")
        if self.format.global_scale:
            return {"global_scale": static.float().view(())}
        if not self.by_modality:
            return {"scale": static.float().view(1, 1)}
        if is_image is None:
            raise ValueError(f"{self.label}: which rows are image tokens is not known")
        image, text = static.float().unbind()
        return {"scale": torch.where(is_image, image, text).unsqueeze(1)}


def input_formats() -> tuple[str, ...]:
    """Return the names of the formats that inputs can be rounded to."""
    return tuple(name for name, one in FORMATS.items() if one.block[0] == 1 and one.symmetric)
