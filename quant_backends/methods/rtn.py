"""RTN, round to nearest: the grid over the range of each group or block, without calibration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import CodesBackend
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.methods.format_options import FormatBackend, act_bits_of
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import UNTOUCHED_BITS, QuantSpec


@dataclass(frozen=True)
class RtnBackend(FormatBackend, CodesBackend):
    """Round-to-nearest weights: integers, symmetric or asymmetric, in groups along the input, or any format.

    Attributes:
        act_bits: Number of bits of the layers' inputs, an older form of `activation_format`: 8 is int8, each token by
            its own largest magnitude (W8A8, W4A8); 16 leaves them as they are.
    """

    name = "rtn"
    bits = frozenset(range(2, 9))
    act_bits: int = UNTOUCHED_BITS

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation_format", act_bits_of(self.act_bits, self.activation_format))
        super().__post_init__()

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer into a packed layer."""
        return self.assemble(self.round(weight, spec), spec, weight.shape[1], weight.dtype, bias=bias)

    def quantize(self, weight: Tensor, spec: QuantSpec) -> Codes:
        """Round a weight (rows, columns) to the nearest integer codes."""
        return round_by_blocks(weight, self.spec_of(spec))


def nearest(
    layer: nn.Linear, spec: QuantSpec, kind: type[PackedLinear] = PackedLinear, *, in_scale: Tensor | None = None
) -> PackedLinear:
    """Return a packed layer with the weight of a layer rounded to the nearest integers.

    Args:
        layer: Dense layer.
        spec: Bits, group size, symmetry.
        kind: Class of the packed layer.
        in_scale: Factors (columns,) of the packed layer's input, by which the weight's columns are divided first.
    """
    codes = round_by_blocks(layer.weight, spec, in_scale)
    return kind.from_codes(codes, spec, layer.in_features, bias=layer.bias, in_scale=in_scale)
