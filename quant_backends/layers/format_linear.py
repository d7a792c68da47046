"""Linear layers whose weight is stored in a format of `lmms_plugin.quant_backends.formats`, codes packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.formats.codec import EncodedTensor, decode, encode
from lmms_plugin.quant_backends.formats.entries import NumberFormat
from lmms_plugin.quant_backends.layers.dense_products import DenseProducts
from lmms_plugin.quant_backends.layers.input_rounding import InputRounding
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.layers.packing import pack, plane_bytes, plane_widths, unpack
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundsInputs

STORED = {"float32": torch.int32, "e8m0": torch.uint8, "e4m3": torch.uint8}
"""Scale -> integers that hold its bits: a change of a model's dtype changes floats, and may not change these."""

READ = {"float32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


class FormatCodes(NamedTuple):
    """Weight quantized in a format; takes the place of `lmms_plugin.quant_backends.layers.codes.Codes`.

    Attributes:
        codes: (rows, columns) uint8.
        scale: (row blocks, column blocks), as the format stores it.
        global_scale: () float32; None for formats without.
        format: Format.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    format: NumberFormat

    @classmethod
    def of(cls, weight: Tensor, form: NumberFormat) -> FormatCodes:
        """Round a weight (rows, columns) to nearest."""
        codes, scale, _, total = encode(weight, form)
        return cls(codes, scale, total, form)

    @property
    def encoded(self) -> EncodedTensor:
        """Return what the codec decodes."""
        return EncodedTensor(self.codes, self.scale, None, self.global_scale)

    def dequantize(self, bits: int, dtype: torch.dtype) -> Tensor:
        """Return the weight, (rows, columns) in `dtype`; the bits are those of the format."""
        return decode(self.encoded, self.format, dtype)


class FormatLinear(RoundsInputs, DenseProducts, QuantizedLinear):
    """Linear layer over a weight in some format, whose inputs may be rounded, too.

    The weight is decoded in float32 and rounded once to the dtype of the inputs, for each product or to be kept; with
    rounded inputs all of it is float32. Buffers hold integers alone. Blocks that the weight does not fill are as if
    padded with zeros, which are not stored.

    Args:
        in_features: Number of columns of the weight.
        out_features: Number of rows of the weight.
        form: Format of the weight.
        bias: Whether there is a bias.
        dtype: Dtype of bias and `in_scale`, in which the layer computes.
        device: Device of the buffers.
        with_in_scale: Whether the input is multiplied by a vector first (activation-aware methods).
        rounding: Rounding of the inputs; None for none.
    """

    coded = ("plane_",)

    in_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: NumberFormat,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        with_in_scale: bool = False,
        rounding: InputRounding | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format, self.dtype = in_features, out_features, form, dtype
        self.bits, self.group_size = form.bits, form.block_of(out_features, in_features)[1]
        for width in plane_widths(form.bits):
            plane = torch.empty(out_features, plane_bytes(in_features, width), dtype=torch.uint8, device=device)
            self.register_buffer(f"plane_{width}", plane)
        blocks = form.blocks(out_features, in_features)
        self.register_buffer("scale_bits", torch.empty(blocks, dtype=STORED[form.scale], device=device))
        total = torch.empty((), dtype=torch.int32, device=device) if form.global_scale else None
        self.register_buffer("global_scale_bits", total)
        in_scale = torch.empty(in_features, dtype=dtype, device=device) if with_in_scale else None
        self.register_buffer("in_scale", in_scale)
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None
        self.rounding = rounding
        self.register_static_scale(device)

    @classmethod
    def from_codes(
        cls,
        quantized: FormatCodes,
        dtype: torch.dtype,
        *,
        bias: nn.Parameter | None = None,
        in_scale: Tensor | None = None,
        rounding: InputRounding | None = None,
        static_scale: Tensor | None = None,
    ) -> FormatLinear:
        """Pack a quantized weight.

        Args:
            quantized: Codes and scales.
            dtype: Dtype in which the layer computes.
            bias: Bias (rows,), kept unchanged.
            in_scale: Factors (columns,) of the input columns.
            rounding: Rounding of the inputs.
            static_scale: Number from `InputRounding.static_scale`, for a static rounding.
        """
        rows, columns = quantized.codes.shape
        layer = cls(columns, rows, quantized.format, dtype=dtype, device="meta", rounding=rounding)
        for width, plane in zip(plane_widths(layer.bits), pack(quantized.codes, layer.bits), strict=True):
            setattr(layer, f"plane_{width}", plane)
        layer.scale_bits = quantized.scale.detach().contiguous().view(STORED[quantized.format.scale])
        if quantized.global_scale is not None:
            layer.global_scale_bits = quantized.global_scale.detach().float().view(()).view(torch.int32)
        layer.in_scale = None if in_scale is None else in_scale.detach().contiguous()
        layer.bias = bias
        layer.set_static_scale(static_scale)
        return layer

    def codes(self, start: int, stop: int) -> FormatCodes:
        """Return some rows as they were given; the first one must be the first row of a block."""
        planes = [self.get_buffer(f"plane_{width}")[start:stop] for width in plane_widths(self.bits)]
        height = self.format.block_of(self.out_features, self.in_features)[0]
        scale = self.get_buffer("scale_bits").view(READ[self.format.scale])[start // height : -(-stop // height)]
        total = self._buffers["global_scale_bits"]
        # One block over all rows covers fewer rows in the same way.
        total = None if total is None else total.view(torch.float32)
        # Planes may lie in host memory, where dense weights are kept on the device.
        codes = unpack(planes, self.bits, self.in_features).to(self.device)
        return FormatCodes(codes, scale, total, self.format)

    @property
    def quantized(self) -> FormatCodes:
        """Return codes and scales, unpacked at each call."""
        return self.codes(0, self.out_features)

    @property
    def kernel(self) -> str:
        """Return what the forward pass runs on."""
        inputs = "" if self.rounding is None else f", {self.rounding.label}"
        return f"{self.format.label}, {self.multiplied()}{inputs}"

    @property
    def device(self) -> torch.device:
        """Return the device where the layer computes."""
        return self.get_buffer("scale_bits").device

    @property
    def operand_dtype(self) -> torch.dtype:
        """Return the dtype in which products read the weight: that of sums of rounded inputs is float32."""
        return self.dtype if self.rounding is None else torch.float32

    def operand(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight as products read them, without input scale."""
        return self._dense(start, stop, dtype).contiguous()

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of codes, scales and input scale, and of the static scale of the inputs."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the weight, the input scale included, in the layer's dtype."""
        weight = self._dense(start, stop, self.dtype)
        return weight if self.in_scale is None else weight * self.in_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` in the dtype of `x`, shape (..., out_features)."""
        rows = x if self.in_scale is None else x * self.in_scale.to(x.dtype)
        if self.rounding is not None:
            rows = self.rounded(rows)
        # The product of rounded inputs is summed in float32, as kernels of low-bit formats do.
        return self.product(rows, self.bias).to(x.dtype)

    def _dense(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        height = self.format.block_of(self.out_features, self.in_features)[0]
        first = start // height * height
        return self.codes(first, stop).dequantize(self.bits, dtype)[start - first :]

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.in_features}, {self.out_features}, {self.kernel}"
