"""Bit planes and the packed linear layer: nothing lost, nothing wasted."""

import copy

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends.layers.codes import Codes, split_groups
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.layers.packing import pack, plane_widths, unpack
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantSpec


def packed(rows=16, columns=96, bits=4, group_size=32, dtype=torch.float32, symmetric=False, bias=True, in_scale=None):
    """Return a dense layer and the packed one made from it by rounding."""
    generator = torch.Generator().manual_seed(bits)
    dense = nn.Linear(columns, rows, bias=bias).to(dtype)
    dense.weight.data = torch.randn(rows, columns, generator=generator).to(dtype)
    spec = QuantSpec(bits, group_size, symmetric)
    codes = round_to_nearest(dense.weight.float(), spec, dtype)
    return dense, PackedLinear.from_codes(codes, spec, columns, bias=dense.bias, in_scale=in_scale)


@pytest.mark.parametrize("columns", [1, 7, 64, 300, 3420, 4304])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_and_odd_length_survive_packing(bits, columns):
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits, columns), codes)
    assert torch.equal(unpack([plane[1:2] for plane in planes], bits, columns), codes[1:2])
    assert all(plane.dtype == torch.uint8 for plane in planes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_n_bits_take_n_bits(bits):
    codes = torch.zeros(4, 256, dtype=torch.uint8)
    assert sum(plane_widths(bits)) == bits
    assert 8 * sum(plane.untyped_storage().nbytes() for plane in pack(codes, bits)) == bits * codes.numel()


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        plane_widths(bits)


@pytest.mark.parametrize("columns", [300, 3420, 4304])
def test_columns_that_no_group_divides_are_padded_with_zeros_and_cut_off_again(columns):
    dense, layer = packed(columns=columns, group_size=128, bits=8)
    assert layer.padded_columns == -columns % 128
    assert layer.weight.shape == dense.weight.shape
    assert (layer.weight - dense.weight).abs().max() <= layer.quantized.scale.max() / 2 + 1e-6
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    # Thousands of float32 products are added in another order.
    torch.testing.assert_close(layer(x), x @ layer.weight.T + dense.bias, rtol=1e-4, atol=1e-3)


def test_a_group_is_never_wider_than_the_row():
    """A width of 64 in groups of 128 would be padded to twice its size."""
    dense, layer = packed(columns=64, group_size=128, bits=4)
    assert (layer.group_size, layer.padded_columns) == (64, 0)
    rows = dense.weight.shape[0]
    assert layer.weight_bytes == rows * (32 + 4 + 1)
    whole = packed(columns=64, group_size=-1, bits=4)[1]
    assert torch.equal(layer.weight, whole.weight)


def test_one_group_per_row():
    _, layer = packed(columns=300, group_size=-1)
    assert layer.quantized.scale.shape == (16, 1)
    assert layer.padded_columns == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_reported_bytes_are_the_bytes_of_real_storages(bits, symmetric):
    _, layer = packed(rows=384, columns=512, bits=bits, group_size=64, symmetric=symmetric)
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in layer.buffers()}
    groups = 384 * 512 // 64
    assert layer.weight_bytes == sum(storages.values()) == 384 * 512 * bits // 8 + groups * (4 if symmetric else 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_a_linear_layer_with_the_dequantized_weight(dtype):
    _, layer = packed(dtype=dtype, in_scale=torch.rand(96).to(dtype) + 0.5, bias=False)
    x = torch.randn(2, 5, 96).to(dtype)
    expected = nn.functional.linear(x * layer.in_scale, layer.dequantize(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    assert float((layer(x) - expected).float().norm() / expected.float().norm()) < tolerance
    assert layer(x).dtype == dtype


def test_the_weight_of_a_layer_with_input_scale_is_the_one_it_stands_for():
    _, layer = packed(in_scale=torch.rand(96) + 0.5)
    x = torch.randn(4, 96)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_codes_are_kept_when_the_dtype_changes():
    _, layer = packed()
    before = layer.quantized.codes.clone()
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.quantized.codes, before)
    assert half.quantized.scale.dtype == half.bias.dtype == half.weight.dtype == torch.bfloat16
    assert half.quantized.zero_point.dtype == torch.uint8
    assert layer.quantized.scale.dtype == torch.float32, "a deep copy shares nothing"


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "in_scale", "float_zero"])
def test_state_dict_round_trip(bits, kind):
    in_scale = torch.rand(96) + 0.5 if kind == "in_scale" else None
    _, layer = packed(bits=bits, symmetric=kind == "symmetric", in_scale=in_scale)
    if kind == "float_zero":
        codes = layer.quantized
        codes = codes._replace(zero_point=codes.zero_point.float() + 0.25)
        layer = PackedLinear.from_codes(codes, layer.spec, 96, bias=layer.bias)
    empty = PackedLinear(
        96, 16, layer.spec, bias=True, float_zero_point=kind == "float_zero", with_in_scale=in_scale is not None
    )
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(empty(x), layer(x))


def test_a_scale_of_the_wrong_shape_is_refused():
    _, layer = packed()
    codes = layer.quantized
    with pytest.raises(ValueError, match=r"scale .* should be \(16, 3\)"):
        PackedLinear.from_codes(Codes(codes.codes, codes.scale[:, :2], codes.zero_point), layer.spec, 96)


def test_groups_follow_the_columns():
    groups = split_groups(torch.arange(10.0).view(2, 5), 2)
    assert groups.tolist() == [[[0, 1], [2, 3], [4, 0]], [[5, 6], [7, 8], [9, 0]]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_same_on_a_gpu(bits):
    _, layer = packed(bits=bits)
    there = copy.deepcopy(layer).to("cuda")
    assert torch.equal(there.weight.cpu(), layer.weight)
    x = torch.randn(3, 96)
    torch.testing.assert_close(there(x.cuda()).cpu(), layer(x), rtol=1e-4, atol=1e-4)
