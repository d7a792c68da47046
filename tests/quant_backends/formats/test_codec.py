"""Formats against torch, compressed-tensors, torchao and bitsandbytes: the same bits on the same tensors."""

import math
from dataclasses import replace

import pytest
import torch

from lmms_plugin.quant_backends.formats.codec import EncodedTensor, decode, effective_scale, encode, fake_quantize
from lmms_plugin.quant_backends.formats.entries import FORMATS, format_of
from lmms_plugin.quant_backends.layers.packing import pack

FLOATS = [name for name, one in FORMATS.items() if not one.element.integer]


def awkward(rows=96, columns=256):
    """Gaussian numbers of very different sizes, with blocks of zeros, subnormals and single outliers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x *= (
        torch.randint(-20, 12, (rows, -(-columns // 16)), generator=generator)
        .float()
        .exp2()
        .repeat_interleave(16, 1)[:, :columns]
    )
    x[0] = 0
    x[1, :64], x[2, :32] = 0, 1e-40
    x[3, 5], x[4, 7], x[5, :16] = 3e4, -0.0, 6.0
    x[6, ::2] = -0.0
    return x


def test_a_wrong_name_is_told_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown format 'nvfp5'.*nvfp4"):
        format_of("nvfp5")


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_those_of_what_is_packed(name):
    form = FORMATS[name]
    rows, columns = 130, 320
    found = encode(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16(), form)
    stored = [*pack(found.codes, form.bits), *(part for part in found[1:] if part is not None)]
    size = 8 * sum(part.numel() * part.element_size() for part in stored)
    assert form.bits_per_weight(rows, columns) == pytest.approx(size / (rows * columns), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp4", 4.25), ("mxfp6_e2m3", 6.25), ("mxfp8", 8.25), ("nf4", 4.5), ("fp8_e4m3_block", 8.001953125)],
)
def test_bits_that_everybody_quotes(name, bits):
    assert FORMATS[name].bits_per_weight(256, 512) == bits
    assert FORMATS["nvfp4"].bits_per_weight(256, 512) == 4.5 + 32 / (256 * 512)


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_what_was_decoded_changes_nothing(name):
    form, x = FORMATS[name], awkward()
    once = fake_quantize(x, form)
    assert once.isfinite().all()
    found = encode(x, form)
    assert torch.equal(decode(found, form), once)
    if form.symmetric:
        again = encode(once, form, scale=found.scale, global_scale=found.global_scale)
        assert torch.equal(decode(again, form), once)


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_that_do_not_divide_are_as_if_padded_with_zeros(name):
    form, x = FORMATS[name], awkward(70, 100)
    height, width = (size or 1 for size in form.block)
    padded = torch.nn.functional.pad(x, (0, -100 % width, 0, -70 % height))
    assert torch.equal(fake_quantize(x, form), fake_quantize(padded, form)[:70, :100])
    assert encode(x, form).scale.shape == form.blocks(70, 100)


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_of_a_stack_do_not_feel_each_other(name):
    form, x = FORMATS[name], awkward(8, 128).view(2, 4, 128)
    assert torch.equal(fake_quantize(x, form), torch.stack([fake_quantize(one, form) for one in x]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_a_block_with_a_number_that_is_not_finite_is_nan(name, bad):
    form, x = FORMATS[name], torch.ones(4, 128)
    x[1, 3] = bad
    values = fake_quantize(x, form)
    height, width = form.block_of(4, 128)
    block = values[:height, :width] if height > 1 else values[1:2, :width]
    assert block.isnan().all()


def test_static_scales_saturate_and_keep_nan():
    x = torch.tensor([[100.0, -100.0, 0.26, math.nan, math.inf]])
    for name, largest in (("fp8_e4m3_tensor", 448), ("mxfp4", 6), ("int8", 127)):
        form = (
            FORMATS[name] if name != "mxfp4" else replace(FORMATS["fp8_e4m3_tensor"], element=FORMATS["mxfp4"].element)
        )
        form = replace(form, reach=127.0) if name == "int8" else form
        found = fake_quantize(x, form, scale=torch.tensor([[0.1]]))
        assert found[0, :2].tolist() == pytest.approx([min(100, largest / 10), -min(100, largest / 10)], rel=0.02)
        assert found[0, 4] == pytest.approx(largest / 10)
        assert found[0, 3].isnan() or name == "int8"


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_floats_of_8_bits_are_torchs_cast(name):
    form, x = FORMATS[name], awkward()
    scale = (x.abs().amax(1, keepdim=True) / form.element.largest).where(x.abs().amax(1, keepdim=True) > 0, 1.0)
    dtype = torch.float8_e4m3fn if name.endswith("e4m3") else torch.float8_e5m2
    found = encode(x, form)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.codes, (x / scale).to(dtype).view(torch.uint8))
    assert torch.equal(decode(found, form), (x / scale).to(dtype).float() * scale)


# --- compressed-tensors ---------------------------------------------------------------------------------------------

PRESETS = {
    "fp8_e4m3": "FP8_DYNAMIC",
    "fp8_e4m3_tensor": "FP8",
    "fp8_e4m3_block": "FP8_BLOCK",
    "mxfp4": "MXFP4A16",
    "mxfp6_e2m3": "MXFP6A16",
    "nvfp4": "NVFP4A16",
}


def compressed(x, name):
    """Scales, global scale and dequantized values as compressed-tensors makes them."""
    library = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = library.preset_name_to_scheme(PRESETS[name], ["Linear"]).weights
    height, width = FORMATS[name].block_of(*x.shape)
    blocks = x.view(x.shape[0] // height, height, x.shape[1] // width, width)
    total = helpers.generate_gparam(x.min(), x.max()) if name == "nvfp4" else None
    scale, zero = helpers.calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args, global_scale=total)
    # Its kernels work in place on what they are given.
    return scale, total, forward.fake_quantize(x.clone(), scale, zero, args, global_scale=total)


@pytest.mark.parametrize("name", PRESETS)
def test_the_values_are_those_of_compressed_tensors(name):
    form, x = FORMATS[name], awkward(128, 256)
    scale, total, values = compressed(x, name)
    found = encode(x, form)
    held = x.abs() > 0
    ours = effective_scale(found.scale, found.global_scale, form)
    theirs = scale.float() if total is None else scale.float() / total
    filled = ours != 1.0
    assert torch.equal(ours[filled], theirs.view_as(ours)[filled])
    assert torch.equal(decode(found, form)[held], values.view_as(x)[held])
    assert not decode(found, form)[~held].any()


# --- torchao --------------------------------------------------------------------------------------------------------

MX_DTYPES = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": torch.float4_e2m1fn_x2,
}


@pytest.mark.parametrize("rounding", ["floor", "even"])
@pytest.mark.parametrize("name", MX_DTYPES)
def test_scales_codes_and_values_are_those_of_torchao(name, rounding):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    modes = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode
    form, x = replace(FORMATS[name], rounding=rounding), awkward()
    if name.startswith("mxfp8"):
        # torchao divides a block by 2⁻¹²⁶ where its scale is 2⁻¹²⁷, at which floats of 8 bits tell numbers apart.
        x[2, :32] = 0
    scale, data = mx.to_mx(x, MX_DTYPES[name], 32, scaling_mode=modes[rounding.upper()])
    values = mx.to_dtype(data, scale, MX_DTYPES[name], 32, torch.float32)
    found = encode(x, form)
    assert torch.equal(found.scale, scale.view(torch.uint8))
    assert torch.equal(decode(found, form), values.view_as(x))
    codes = mx.unpack_uint4(data) if name == "mxfp4" else data.view(torch.uint8)
    assert torch.equal(found.codes, codes.view_as(found.codes))


def test_nvfp4_without_a_global_scale_is_torchaos():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    unpack = pytest.importorskip("torchao.prototype.mx_formats.kernels").unpack_uint4
    # Sizes at which neither library's smallest scale matters; torchao multiplies by the reciprocal of the scale.
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    scale, data = nvfp4.nvfp4_quantize(x)
    found = encode(x, FORMATS["nvfp4"], global_scale=torch.tensor(1.0))
    assert torch.equal(found.scale.float(), scale.float())
    differ = found.codes != unpack(data).view_as(found.codes)
    assert differ.float().mean() < 1e-3
    steps = x / scale.float().repeat_interleave(16, 1)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    distance = (steps.abs().unsqueeze(-1) - middles).abs().amin(-1)
    assert (distance[differ] < 1e-6).all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_blocks_of_64_are_those_of_bitsandbytes(name):
    functional = pytest.importorskip("bitsandbytes.functional")
    x, form = torch.randn(32, 256, generator=torch.Generator().manual_seed(2)), FORMATS[name]
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=name)
    theirs = functional.dequantize_4bit(packed.view(-1, 1), state).view_as(x)
    found = encode(x, form)
    assert torch.equal(found.scale.flatten(), state.absmax)
    ours = decode(found, form)
    off = ~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # Its thresholds are decimals of seven digits; nothing else may differ.
    assert off.float().mean() < 1e-3
    assert torch.allclose((ours - x).abs()[off], (theirs - x).abs()[off], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.element.integer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_integers_are_the_grid_of_the_packed_layers(name, dtype):
    from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
    from lmms_plugin.quant_backends.plans.plan import QuantSpec

    form, x = FORMATS[name].in_blocks(1, 32), awkward().to(dtype)
    expected = round_to_nearest(x.float(), QuantSpec(form.bits, 32, form.symmetric), dtype)
    found = encode(x, form)
    assert torch.equal(found.codes.view_as(expected.codes), expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert form.symmetric or torch.equal(found.zero_point, expected.zero_point)
    assert torch.equal(decode(found, form), expected.dequantize(form.bits, torch.float32))


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if not one.global_scale])
def test_no_rows_are_no_rows(name):
    """As an expert gets that no token is sent to."""
    assert fake_quantize(torch.zeros(0, 96), FORMATS[name]).shape == (0, 96)


def test_a_vector_is_one_row():
    x = torch.arange(-8.0, 8.0)
    found = encode(x, FORMATS["mxfp4"])
    assert isinstance(found, EncodedTensor)
    assert found.codes.shape == x.shape
    assert torch.equal(decode(found, FORMATS["mxfp4"]), fake_quantize(x.unsqueeze(0), FORMATS["mxfp4"])[0])
