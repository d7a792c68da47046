"""Options `format` and `activation_format`, which some methods share, and the layers that their results end in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend
from lmms_plugin.quant_backends.formats.compressed import why_not_compressed
from lmms_plugin.quant_backends.formats.entries import NumberFormat, format_of
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.input_rounding import GRANULARITIES, InputRounding
from lmms_plugin.quant_backends.layers.int8_inputs import INT8_TOKENS, Int8InputLinear
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.modalities import MODALITIES
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundedInputLinear
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantSpec
from lmms_plugin.quant_backends.plans.rotation_spec import ROTATED_INPUTS, RotationSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

AS_THEY_ARE = "none"
"""Format of inputs in a plan that means: leave them as they are."""


@dataclass(frozen=True)
class FormatBackend(Backend):
    """Method whose result can be stored in any format, and whose layers can round their inputs.

    Attributes:
        format: Format of the weights (docs/formats.md): nvfp4, mxfp4, fp8_e4m3, ...; None for integers of `bits` bits
            in groups of `group_size`.
        activation_format: Format that the layers' inputs are rounded to at run time; None leaves them as they are.
        activation_granularity: Inputs that share a scale: token, block, tensor (a static scale from calibration), or
            modality (one for image tokens, one for all others); None for blocks where the format has some, else tokens.
        rotation: Rotation of the decoder before it is quantized: hadamard, QuaRot's (docs/quantizers.md); None for
            none.
        rotation_seed: Seed of the rotation.
        rotate_vision: Whether to rotate the vision tower, too, where its norms are LayerNorms.
    """

    format: str | None = None
    activation_format: str | None = None
    activation_granularity: str | None = None
    takes_formats = True

    rotation: str | None = None
    rotation_seed: int = 0
    rotate_vision: bool = False

    def __post_init__(self) -> None:
        if self.activation_granularity is not None and self.activation_format is None:
            raise ValueError(
                f"activation_granularity={self.activation_granularity} needs an activation_format (granularities are"
                f" {', '.join(GRANULARITIES)})"
            )
        if self.format is not None:
            # An instance attribute over the class's: what a plan without bits asks for.
            object.__setattr__(self, "default_bits", format_of(self.format).bits)
        _ = self.rounding, self.rotates

    @property
    def stored(self) -> NumberFormat | None:
        """Return the format of the weights; None for integers, which have layers and kernels of their own."""
        form = None if self.format is None else format_of(self.format)
        return None if form is None or form.element.integer else form

    @cached_property
    def rounding(self) -> InputRounding | None:
        """Return the rounding of the inputs; None for none."""
        if self.activation_format is None:
            return None
        calibrated = isinstance(self, CalibratedBackend)
        return InputRounding.of(self.activation_format, self.activation_granularity, calibrated=calibrated)

    @property
    def scales_by_modality(self) -> bool:
        """Return whether inputs of image tokens and of text have static scales of their own."""
        return self.rounding is not None and self.rounding.by_modality

    def rounding_of(self, statistics: InputStatistics | None) -> InputRounding | None:
        """Return the rounding of a layer's inputs: one scale per modality where its rows are sequence positions."""
        if self.rounding is None or (statistics is not None and statistics.largest_of):
            return self.rounding
        return self.rounding.of_one_modality

    def largest_of(self, statistics: InputStatistics) -> Tensor | None:
        """Return the largest magnitudes from which `rounding_of` takes static scales: (columns,), or of each modality.

        A modality that did not come in calibration has those of the other.
        """
        rounding = self.rounding_of(statistics)
        if rounding is None or not rounding.by_modality:
            return statistics.largest
        found = [statistics.largest_of.get(modality) for modality in MODALITIES]
        return torch.stack([statistics.largest if one is None else one for one in found])  # type: ignore[misc]

    @property
    def rotates(self) -> RotationSpec | None:
        """Return the rotation; inputs of down projections are rotated at run time only if inputs are rounded."""
        online = self.activation_format is not None
        return RotationSpec.of(self.rotation, self.rotation_seed, online=online, vision=self.rotate_vision)

    @property
    def settled(self) -> dict[str, str]:
        """Return the arguments about weights that the format decides, each with the reason."""
        if self.format is None:
            return {}
        form = format_of(self.format)
        symmetry = {"symmetric": f"format={self.format} is {'' if form.symmetric else 'not '}symmetric"}
        if self.stored is None:
            return symmetry
        rows, columns = ("all" if size is None else str(size) for size in form.block)
        return {"group_size": f"format={self.format} scales blocks of {rows} x {columns}", **symmetry}

    @property
    def uncompressed(self) -> str | None:
        """Return why compressed-tensors cannot store its layers, as far as their formats tell; None if it can."""
        if self.rotates is not None and self.rotates.online:
            return ROTATED_INPUTS
        return why_not_compressed(None if self.stored is None else self.stored.name, self.rounding)

    def expect_foldable(self) -> None:
        """Refuse to hand input scales to the rows of a layer before, where rows share a scale.

        Raises:
            ValueError: They do.
        """
        if self.stored is not None and self.stored.block[0] != 1:
            raise ValueError(
                f"{self.name}: fold=True multiplies single rows of layers before, but format={self.format} has scales"
                " over several rows; leave out fold, or take a format with scales per row or block of a row"
            )

    def for_spec(self, spec: QuantSpec) -> Self:
        """Return this backend with the formats that a spec of the plan names.

        Raises:
            ValueError: They do not go with the other options.
        """
        if spec.format is None and spec.activation_format is None:
            return self
        changed: dict[str, Any] = {} if spec.format is None else {"format": spec.format}
        if spec.activation_format is not None:
            if self.rotation is not None:
                raise ValueError(
                    f"rotation={self.rotation} turns the inputs of the whole decoder, which are rounded alike: leave"
                    " activation_format out of the plan, and give it as a model argument"
                )
            inputs = None if spec.activation_format == AS_THEY_ARE else spec.activation_format
            changed |= {"activation_format": inputs, "activation_granularity": None}
            changed |= {"act_bits": UNTOUCHED_BITS} if hasattr(self, "act_bits") else {}
        return replace(self, **changed)

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse a number of bits that the format does not have."""
        own = self.for_spec(spec)
        if own.format is not None and spec.bits != format_of(own.format).bits:
            raise ValueError(
                f"format={own.format} has {format_of(own.format).bits} bits per weight, but {spec.bits} were asked"
                f" for: leave the bits out, or give {UNTOUCHED_BITS} to parts that stay as they are"
            )
        super().check_spec(spec)

    def spec_of(self, spec: QuantSpec) -> QuantSpec:
        """Return a spec with the symmetry that an integer format has."""
        return spec if self.format is None else replace(spec, symmetric=format_of(self.format).symmetric)

    def round(self, weight: Tensor, spec: QuantSpec, in_scale: Tensor | None = None) -> Codes | FormatCodes:
        """Round a weight to nearest.

        Args:
            weight: (rows, columns), any float dtype.
            spec: Spec, of which a format with blocks of its own takes nothing.
            in_scale: Factors (columns,) of the layer's input, by which the weight's columns are divided first.
        """
        if self.stored is None:
            return round_by_blocks(weight, self.spec_of(spec), in_scale)
        return FormatCodes.of(weight if in_scale is None else weight.float() / in_scale.float(), self.stored)

    def assemble(
        self,
        quantized: Codes | FormatCodes,
        spec: QuantSpec,
        columns: int,
        dtype: torch.dtype,
        *,
        bias: nn.Parameter | None,
        in_scale: Tensor | None = None,
        statistics: InputStatistics | None = None,
    ) -> QuantizedLinear:
        """Return the layer over a quantized weight, with rounded inputs where that was asked for.

        Args:
            quantized: Weight.
            spec: Spec that it was quantized for.
            columns: Number of columns of the weight.
            dtype: Dtype in which the layer computes.
            bias: Bias, kept unchanged.
            in_scale: Factors (columns,) of the layer's input.
            statistics: Statistics of its inputs, for a static scale; None if no input reached the layer.

        Raises:
            ValueError: A static scale is asked for, and no input reached the layer.
        """
        rounding, static = self.rounding_of(statistics), self._static_scale(statistics, in_scale)
        if isinstance(quantized, FormatCodes):
            return FormatLinear.from_codes(
                quantized, dtype, bias=bias, in_scale=in_scale, rounding=rounding, static_scale=static
            )
        spec = self.spec_of(spec)
        if rounding is None or rounding == INT8_TOKENS:
            kind = PackedLinear if rounding is None else Int8InputLinear
            return kind.from_codes(quantized, spec, columns, bias=bias, in_scale=in_scale)
        return RoundedInputLinear.rounding_inputs(
            quantized, spec, columns, rounding=rounding, static_scale=static, bias=bias, in_scale=in_scale
        )

    def nearest(
        self,
        layer: nn.Linear,
        spec: QuantSpec,
        *,
        in_scale: Tensor | None = None,
        statistics: InputStatistics | None = None,
    ) -> QuantizedLinear:
        """Return a layer with the weight of a dense one rounded to nearest."""
        weight = layer.weight
        quantized = self.round(weight, spec, in_scale)
        return self.assemble(
            quantized,
            spec,
            layer.in_features,
            weight.dtype,
            bias=layer.bias,
            in_scale=in_scale,
            statistics=statistics,
        )

    def _static_scale(self, statistics: InputStatistics | None, in_scale: Tensor | None) -> Tensor | None:
        rounding = self.rounding_of(statistics)
        if rounding is None or not rounding.static:
            return None
        largest = None if statistics is None else self.largest_of(statistics)
        if largest is None:
            raise ValueError(
                f"{rounding.label}: a layer that no calibration input reached has no static scale; take more or"
                " other samples, activation_granularity=token, or leave the layer out by skip in a plan"
            )
        largest = largest if in_scale is None else largest * in_scale.float().abs()
        return rounding.static_scale(largest.amax(-1))


def act_bits_of(act_bits: int, activation_format: str | None) -> str | None:
    """Return the format of inputs that `act_bits`, the option's older form, or `activation_format` names.

    Raises:
        ValueError: `act_bits` is neither 8 nor 16, or both are given.
    """
    if act_bits not in (8, UNTOUCHED_BITS):
        raise ValueError(
            f"act_bits must be 8, or 16 to leave activations as they are, got {act_bits!r}; other bits and formats are"
            " those of activation_format"
        )
    if act_bits == UNTOUCHED_BITS:
        return activation_format
    if activation_format not in (None, "int8"):
        raise ValueError(
            f"act_bits=8 is activation_format=int8, but activation_format={activation_format} is given, too"
        )
    return "int8"
