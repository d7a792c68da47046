"""Layers in any format: what is stored is what was rounded, in as many bits as the format says."""

import copy

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends.formats.codec import fake_quantize
from lmms_plugin.quant_backends.formats.entries import FORMATS
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.input_rounding import InputRounding, input_formats

FLOATS = [name for name, one in FORMATS.items() if not one.element.integer]


def dense(rows=40, columns=200, dtype=torch.float32):
    layer = nn.Linear(columns, rows)
    layer.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return layer.to(dtype)


def inputs(tokens=7, columns=200):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_the_layer_multiplies_by_the_rounded_weight(name, dtype):
    linear, form = dense(dtype=dtype), FORMATS[name]
    layer = FormatLinear.from_codes(FormatCodes.of(linear.weight, form), dtype, bias=linear.bias)
    rounded = fake_quantize(linear.weight.float(), form).to(dtype)
    assert torch.equal(layer.weight, rounded)
    assert torch.equal(layer.dense_rows(3, 11), rounded[3:11])
    x = inputs().to(dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, rounded, linear.bias))
    expected = form.bits_per_weight(40, 200) * 40 * 200 / 8
    assert expected <= layer.weight_bytes <= expected + 40, "rows are padded to whole bytes"
    # A change of the model's dtype, as loading makes one, changes no bit of the weight.
    assert torch.equal(
        copy.deepcopy(layer).half().quantized.dequantize(0, torch.float32), layer.quantized.dequantize(0, torch.float32)
    )


@torch.no_grad()
@pytest.mark.parametrize("weights", ["fp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("name", input_formats())
def test_rounded_inputs_are_those_of_the_format(name, weights):
    linear, rounding = dense(columns=192), InputRounding.of(name)
    layer = FormatLinear.from_codes(
        FormatCodes.of(linear.weight, FORMATS[weights]), torch.float32, bias=linear.bias, rounding=rounding
    )
    x = inputs(columns=192)
    form = rounding.format
    rounded = torch.stack([fake_quantize(row.unsqueeze(0), form)[0] for row in x])
    torch.testing.assert_close(layer(x), nn.functional.linear(rounded, layer.weight, linear.bias))
    assert layer.act_bits == FORMATS[name].bits
    assert layer(x[:0]).shape == (0, 40)
    # No token feels its neighbours.
    torch.testing.assert_close(layer(torch.cat([x, 1000 * x]))[:7], layer(x))


@torch.no_grad()
def test_a_static_scale_is_the_same_for_all_inputs():
    linear = dense(columns=192)
    rounding = InputRounding.of("fp8_e4m3", "tensor", calibrated=True)
    codes, x = FormatCodes.of(linear.weight, FORMATS["fp8_e4m3"]), inputs(columns=192)
    scale = rounding.static_scale(x.abs().amax())
    assert scale == x.abs().amax() / 448
    layer = FormatLinear.from_codes(codes, torch.float32, bias=None, rounding=rounding, static_scale=scale)
    torch.testing.assert_close(layer(x), (x / scale).to(torch.float8_e4m3fn).float() * scale @ layer.weight.T)
    # What lies outside the range seen in calibration is cut off.
    assert torch.equal(layer(1e6 * x.sign()), layer(1e9 * x.sign()))
    with pytest.raises(ValueError, match="a static scale belongs to a static rounding"):
        FormatLinear.from_codes(codes, torch.float32, bias=None, rounding=rounding)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("fp8_e4m3_block",), "is a format of weights; inputs take int2, "),
        (("int4_asym",), "is a format of weights"),
        (("mxfp4", "token"), "scales blocks of 32 columns"),
        (("int8", "row"), "must be one of token, block, tensor, modality, got 'row'"),
        (("int8", "tensor"), "takes a static scale from calibration inputs, of which this method sees none"),
        (("fp9",), "unknown format 'fp9'"),
    ],
)
def test_impossible_inputs_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        InputRounding.of(*asked)
