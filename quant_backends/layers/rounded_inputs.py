"""Packed linear layers with inputs that are rounded at run time (W8A8, W4A8, W4A4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.input_rounding import InputRounding
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.layers.modalities import image_rows
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantSpec


class RoundsInputs(nn.Module):
    """Part of a layer that rounds its inputs.

    Attributes:
        rounding: Rounding; None for none.
    """

    rounding: InputRounding | None = None

    @property
    def act_bits(self) -> int:
        """Return the number of bits of the inputs; 16 where they are left as they are."""
        return UNTOUCHED_BITS if self.rounding is None else self.rounding.format.bits

    def register_static_scale(self, device: torch.device | str | None = None) -> None:
        """Make room for the static scale of the inputs, where the rounding has one."""
        empty = None
        if self.rounding is not None and self.rounding.static:
            empty = torch.empty(self.rounding.static_shape, dtype=torch.int32, device=device)
        self.register_buffer("input_scale_bits", empty)

    def set_static_scale(self, scale: Tensor | None) -> None:
        """Set the static scale, float32: (), or one for each modality.

        Raises:
            ValueError: The rounding is static and the scale missing, or the other way round.
        """
        if (scale is not None) != (self.rounding is not None and self.rounding.static):
            raise ValueError(f"{type(self).__name__}: a static scale belongs to a static rounding, got {scale!r}")
        if scale is None or self.rounding is None:
            self.input_scale_bits = None
        else:
            self.input_scale_bits = scale.detach().float().reshape(self.rounding.static_shape).view(torch.int32)

    @property
    def static_scale(self) -> Tensor | None:
        """Return the static scale of the inputs, float32: (), or one for each modality; None where there is none."""
        bits = self._buffers.get("input_scale_bits")
        return None if bits is None else bits.view(torch.float32)

    def rounded(self, x: Tensor) -> Tensor:
        """Return inputs (..., columns) after rounding, float32."""
        assert self.rounding is not None
        is_image = image_rows(x) if self.rounding.by_modality else None
        return self.rounding.round(x.reshape(-1, x.shape[-1]).float(), self.static_scale, is_image).view(x.shape)


class RoundedInputLinear(RoundsInputs, PackedLinear):
    """Packed linear layer of integers whose inputs are rounded to any format; products are summed in float32.

    Args:
        rounding: Rounding of the inputs.
        **options: As of `PackedLinear`.
    """

    def __init__(self, *args: Any, rounding: InputRounding | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounding = rounding if rounding is not None else type(self).rounding
        self.register_static_scale(options.get("device"))

    @classmethod
    def rounding_inputs(
        cls,
        quantized: Codes,
        spec: QuantSpec,
        in_features: int,
        *,
        rounding: InputRounding,
        static_scale: Tensor | None = None,
        bias: nn.Parameter | None = None,
        in_scale: Tensor | None = None,
    ) -> RoundedInputLinear:
        """Pack a quantized weight (see `PackedLinear.from_codes`), with the rounding of its inputs."""
        layer = cls.from_codes(quantized, spec, in_features, bias=bias, in_scale=in_scale)
        assert isinstance(layer, RoundedInputLinear)
        layer.rounding = rounding
        layer.set_static_scale(static_scale)
        return layer

    def choose_kernel(self) -> None:
        """Keep the canonical layout, which the products here read."""

    @property
    def kernel(self) -> str:
        """Return what the forward pass runs on."""
        assert self.rounding is not None
        return f"{self.rounding.label}, {self.multiplied()}"

    @property
    def operand_dtype(self) -> torch.dtype:
        """Return float32, in which the products of rounded inputs are summed."""
        return torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """Return ``round(x) @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        rows = x.float()
        if self.in_scale is not None:
            rows = rows * self.in_scale.float()
        return self.product(self.rounded(rows), self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{super().extra_repr()}, {'' if self.rounding is None else self.rounding.label}"
