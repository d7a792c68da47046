"""8-bit activations: the numbers of plain integer arithmetic, whatever multiplies; searches that see the rounding."""

import copy

import pytest
import torch
from helpers.families import FAMILIES
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.layers.int8_inputs import (
    EXACT_COLUMNS,
    Int8InputLinear,
    has_integer_product,
    integer_product,
    round_inputs,
)
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.methods.mbq import MbqBackend
from lmms_plugin.quant_backends.methods.rtn import RtnBackend
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.methods.scale_search import EXPONENTS
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import InputStatistics, Sensitivity


def test_inputs_are_rounded_by_the_largest_of_their_own_row():
    x = torch.tensor([[0.0, 1.0, -2.54], [127.0, -126.4, 0.6], [0.0, 0.0, 0.0]])
    codes, scale = round_inputs(x)
    assert scale.flatten().tolist() == pytest.approx([0.02, 1.0, 1.0])
    assert codes.tolist() == [[0, 50, -127], [127, -126, 1], [0, 0, 0]]
    assert round_inputs(x[:0]).codes.shape == (0, 3)


def test_rounding_is_off_by_half_a_step_at_most():
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50).unsqueeze(1)
    codes, scale = round_inputs(x)
    assert ((codes * scale - x).abs() <= scale * (0.5 + 1e-4)).all()
    assert (codes.abs().amax(1) == 127).all()


GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def native(device):
    return pytest.param(True, device, id=f"torch._int_mm {device}", marks=GPU if device == "cuda" else ())


@pytest.mark.parametrize(("own", "device"), [pytest.param(False, "cpu", id="float32"), native("cpu"), native("cuda")])
@pytest.mark.parametrize("columns", [8, EXACT_COLUMNS, 4304])
@pytest.mark.parametrize("tokens", [1, 17, 24])
def test_products_of_integers_are_exact(tokens, columns, own, device):
    if own and not has_integer_product(columns, 16, torch.device(device)):
        pytest.skip("torch's product is slow here, or not exact")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (16, columns), dtype=torch.int8, generator=generator)
    # The largest sums there are, and ones that end in an odd last bit, which float32 would drop beyond 2²⁴.
    weight[0], inputs[0] = -128, 127
    weight[1] = torch.tensor([127, 126]).to(torch.int8).repeat(columns)[:columns]
    weight[1, 0] = 125
    product = integer_product(inputs.to(device), weight.to(device), native=own).cpu()
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), inputs.long() @ weight.long().T)


def layer_of(bits, group_size, symmetric, *, columns=96, bias=True, in_scale=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(bits)
    dense = nn.Linear(columns, 24, bias=bias)
    dense.weight.data = torch.randn(24, columns, generator=generator)
    dense = dense.to(dtype)
    spec = QuantSpec(bits, group_size, symmetric)
    codes = round_to_nearest(dense.weight.float(), spec, dtype)
    return dense, Int8InputLinear.from_codes(codes, spec, columns, bias=dense.bias, in_scale=in_scale)


def straightforward(layer, x):
    """Return the output for one input vector after another, summed in integers, group by group."""
    stored = layer.quantized
    zero = torch.full_like(stored.scale, 1 << (layer.bits - 1)) if stored.zero_point is None else stored.zero_point
    weight = stored.codes.long() - zero.long().unsqueeze(-1)
    rows = []
    for vector in x.reshape(-1, x.shape[-1]):
        vector = vector.float() if layer.in_scale is None else vector.float() * layer.in_scale
        scale = vector.abs().max() / 127
        codes = (vector / scale).round().long()
        codes = torch.cat([codes, codes.new_zeros(layer.padded_columns)]).view(weight.shape[1:])
        sums = (weight * codes).sum(-1).double() * stored.scale.double()
        rows.append(sums.sum(-1) * scale + (0 if layer.bias is None else layer.bias))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "group_size", [None, 128, 32, 40], ids=["row", "wider than the row", "groups", "padded groups"]
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_the_layer_computes_what_integers_give(bits, symmetric, group_size):
    in_scale = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.5
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
    for options in ({}, {"bias": False}, {"in_scale": in_scale}):
        _, layer = layer_of(bits, group_size, symmetric, **options)
        torch.testing.assert_close(layer(x).double(), straightforward(layer, x).double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_token_does_not_feel_its_neighbours(group_size):
    _, layer = layer_of(4, group_size, symmetric=False)
    x = torch.randn(9, 96, generator=torch.Generator().manual_seed(2))
    loud = torch.cat([x, 1000 * x])
    torch.testing.assert_close(layer(loud)[:9], layer(x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
def test_eight_bits_of_both_are_close_to_the_dense_layer(group_size, dtype):
    dense, layer = layer_of(8, group_size, symmetric=True, dtype=dtype)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = x.double() @ dense.weight.double().T + dense.bias.double()
    error = (y.double() - exact).norm() / exact.norm()
    # Rounding a Gaussian of 96 numbers to 127 steps of its largest one costs about 0.6 %.
    assert 0.002 < error < 0.02


@torch.no_grad()
def test_only_the_inputs_differ_from_the_packed_layer():
    """Inputs that 8 bits hold exactly give the packed layer's own output."""
    _, layer = layer_of(4, 32, symmetric=False)
    plain = PackedLinear.from_codes(layer.quantized, layer.spec, 96, bias=layer.bias)
    x = torch.randint(-127, 128, (6, 96), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-3)
    assert not torch.allclose(layer(x + 0.4), plain(x + 0.4), rtol=1e-4)
    assert layer.weight_bytes == plain.weight_bytes
    assert torch.equal(layer.weight, plain.weight)


def test_the_layer_survives_copying_and_its_state():
    _, layer = layer_of(4, None, symmetric=False)
    _, other = layer_of(4, None, symmetric=False)
    x = torch.randn(3, 96)
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), other, layer.to(torch.float32)):
        assert torch.equal(twin(x), layer(x))
        assert isinstance(twin, Int8InputLinear)


@pytest.mark.parametrize("act_bits", [4, 0, 32])
@pytest.mark.parametrize("method", ["rtn", "mbq"])
def test_other_numbers_of_bits_are_refused(method, act_bits):
    with pytest.raises(
        ValueError, match=f"act_bits must be 8, or 16 to leave activations as they are, got {act_bits};"
    ):
        get(method, act_bits=act_bits)


@pytest.mark.parametrize("method", ["hqq", "awq"])
def test_methods_without_it_say_so(method):
    with pytest.raises(ValueError, match=f"unknown option 'act_bits' .*'{method}'"):
        get(method, act_bits=8)


def calibration(checkpoint, family, samples=2):
    path = checkpoint(family)
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    spec = CalibrationSpec("noise", samples)
    drawn = [sample._replace(image=sample.image.resize((64, 48))) for sample in spec.load_samples()]
    dialect = dialect_for(model.config.model_type)
    batches, _ = build_batches(model, processor, spec, drawn, dialect, keep_logits=False, by_role=True)
    return model, batches


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_and_w4a8_on_every_family(checkpoint, family):
    model, batches = calibration(checkpoint, family)
    inputs = {key: value for key, value in batches[0].items() if key not in ("token_roles", "logits_to_keep")}
    exact = model(**inputs).logits
    errors = {}
    for bits, group_size in ((8, None), (4, 32)):
        quantized = copy.deepcopy(model)
        plan = QuantPlan.from_arguments(bits=bits, group_size=group_size, vision_bits=bits, symmetric=True)
        work = quantize(quantized, RtnBackend(act_bits=8), plan)
        reports = [report for report in work.modules() if report.reason is None]
        assert {report.component for report in reports} == {"vision", "language"}
        assert all(report.kernel.startswith("8-bit inputs") for report in reports)
        assert all(isinstance(quantized.get_submodule(report.name), Int8InputLinear) for report in reports)
        logits = quantized(**inputs).logits
        assert torch.isfinite(logits).all()
        errors[bits] = float((logits - exact).norm() / exact.norm())
    assert 0 < errors[8] < errors[4]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "gemma3"])
def test_mbq_through_the_whole_model(checkpoint, family):
    model, batches = calibration(checkpoint, family)
    plan = QuantPlan.from_arguments(bits=4, group_size=None, vision_bits=8, symmetric=True)
    work = quantize(model, MbqBackend(act_bits=8), plan, batches)
    reports = [report for report in work.modules() if report.reason is None]
    assert {report.method for report in reports} <= {"mbq", "mbq, unbalanced", "mbq, uncalibrated"}
    language = [report for report in reports if report.component == "language"]
    assert all(report.method == "mbq" and 0 < report.output_error < 1 for report in language)
    assert all(report.kernel.startswith("8-bit inputs") for report in reports)
    inputs = {key: value for key, value in batches[0].items() if key != "token_roles"}
    assert torch.isfinite(model(**inputs).logits).all()


def gathered(image, answer, ratio):
    entry = InputStatistics.empty(("layer",), image.shape[1], torch.device("cpu"), by_role=True)
    entry.add(torch.cat([image, answer]), torch.cat([torch.zeros(len(image)), torch.full((len(answer),), 2)]))
    entry.sensitivity = Sensitivity(ratio, 1.0, ratio)
    return entry


def authors_search(weight, spec, image, answer, ratio, power):
    """Return the exponent of the authors' loop for weights and activations, one candidate at a time."""
    magnitude = torch.cat([image, answer]).abs().mean(0)
    losses = []
    for exponent in EXPONENTS:
        scale = magnitude.pow(exponent).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        kept = round_to_nearest(weight * scale, spec, torch.float32).dequantize(spec.bits, torch.float32)
        sums = []
        for x in (image, answer):
            step = (x / scale).abs().amax(1, keepdim=True) / 127
            rounded = ((x / scale) / step).round() * step
            sums.append((rounded @ kept.T - x @ weight.T).abs().pow(power).sum())
        if power == 2:
            sums = [sums[0] / len(image), sums[1] / len(answer)]
        losses.append(float(ratio * sums[0] + sums[1]))
    return EXPONENTS[losses.index(min(losses))]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("seed", range(3))
def test_the_search_sees_what_rounding_the_inputs_costs(seed, loss, bits):
    generator = torch.Generator().manual_seed(seed)
    image, answer = (torch.randn(count, 32, generator=generator) for count in (80, 20))
    image[:, 3] *= 40
    answer[:, 7] *= 10
    torch.manual_seed(seed)
    layer, spec = nn.Linear(32, 24), QuantSpec(bits, None, True)
    entry = gathered(image, answer, 0.3)
    (found,) = MbqBackend(loss=loss, act_bits=8).solve([layer], [spec], entry)
    power = {"mae": 1, "mse": 2}[loss]
    exponent = authors_search(layer.weight.detach(), spec, image, answer, 0.3, power)
    scale = torch.cat([image, answer]).abs().mean(0).pow(exponent)
    scale = scale / (scale.max() * scale.min()).sqrt()
    torch.testing.assert_close(found.layer.in_scale, 1 / scale)
    assert isinstance(found.layer, Int8InputLinear)
    if bits == 8:
        # A column forty times louder than the rest takes the bits of all inputs: some of it must move to the weight.
        assert exponent > 0


@torch.no_grad()
def test_the_search_makes_outputs_better_where_a_column_is_loud():
    generator = torch.Generator().manual_seed(0)
    image, answer = (torch.randn(count, 64, generator=generator) for count in (80, 40))
    for x in (image, answer):
        x[:, 5] *= 60
    torch.manual_seed(0)
    layer, spec = nn.Linear(64, 24), QuantSpec(8, None, True)
    backend = MbqBackend(act_bits=8)
    (found,) = backend.solve([layer], [spec], gathered(image, answer, 0.5))
    plain = backend.without_inputs(layer, spec)
    for x in (image, answer):
        exact = layer(x)
        assert (found.layer(x) - exact).norm() < 0.5 * (plain(x) - exact).norm()
