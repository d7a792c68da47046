"""AWQ: never worse than rounding on what it was calibrated on, better where channels differ, always the same."""

import copy

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends.activations import InputStatistics, capture, shared_inputs
from lmms_plugin.quant_backends.awq import EXPONENTS, AwqBackend, candidates, search
from lmms_plugin.quant_backends.plan import QuantSpec
from lmms_plugin.quant_backends.rtn import round_to_nearest

COLUMNS = 64


class Attention(nn.Module):
    """Three layers fed one tensor, a fourth behind them, a fifth that never runs."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(COLUMNS, COLUMNS) for _ in range(3))
        self.out = nn.Linear(COLUMNS, COLUMNS)
        self.unused = nn.Linear(COLUMNS, COLUMNS)
        self.after = 0

    def forward(self, x):
        mixed = torch.tanh(self.q(x)) * torch.tanh(self.k(x)) + self.v(x)
        mixed = self.out(input=mixed)
        self.after += 1
        return mixed


def inputs(count=6, outliers=0.0, seed=0):
    """Return samples (rows, columns) of different lengths, with `outliers` times larger values in four channels."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(COLUMNS)
    scale[[3, 17, 40, 63]] += outliers
    return [torch.randn(5 + index, COLUMNS, generator=generator) * scale for index in range(count)]


def statistics(samples):
    entry = InputStatistics(("layer",), torch.zeros(COLUMNS, COLUMNS), torch.zeros(COLUMNS, dtype=torch.float64))
    for x in samples:
        entry.add(x)
    return entry


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention().eval()


def output_error(weight, other, samples):
    x = torch.cat(samples)
    return float(((x @ (weight - other).T) ** 2).sum())


@pytest.mark.parametrize("outliers", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_output_error_is_never_above_rounding_and_below_it_where_channels_differ(bits, outliers, symmetric):
    weight = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(1))
    samples = inputs(outliers=outliers)
    spec = QuantSpec(bits, 32, symmetric)
    found = search([weight], [spec], statistics(samples))
    scaled = round_to_nearest(weight / found.in_scale, spec, torch.float32)
    calibrated = output_error(weight, scaled.dequantize(bits, torch.float32) * found.in_scale, samples)
    rounded = round_to_nearest(weight, spec, torch.float32).dequantize(bits, torch.float32)
    plain = output_error(weight, rounded, samples)
    assert calibrated <= plain * (1 + 1e-5)
    if outliers >= 3:
        assert calibrated < 0.9 * plain
        assert found.exponent > 0


def test_the_reported_error_is_that_of_the_outputs():
    weight = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(1))
    samples = inputs(outliers=3)
    spec = QuantSpec(3, 32)
    found = search([weight], [spec], statistics(samples))
    stored = (
        round_to_nearest(weight / found.in_scale, spec, torch.float32).dequantize(3, torch.float32) * found.in_scale
    )
    x = torch.cat(samples)
    expected = (x @ (weight - stored).T).norm() / (x @ weight.T).norm()
    assert found.output_errors[0] == pytest.approx(float(expected), rel=1e-4)


def test_candidate_scales_are_those_of_the_paper():
    magnitude = torch.tensor([0.25, 1.0, 4.0])
    inverse = candidates(magnitude, torch.float32)
    half = EXPONENTS.index(0.5)
    # sqrt: 0.5, 1, 2; divided by sqrt(2 · 0.5) = 1.
    assert inverse[half].tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert inverse[0].tolist() == [1.0, 1.0, 1.0]
    scale = 1 / inverse
    torch.testing.assert_close(scale.amax(1) * scale.amin(1), torch.ones(len(EXPONENTS)))


def test_a_channel_that_is_always_zero_breaks_nothing():
    samples = inputs()
    for x in samples:
        x[:, 5] = 0
    found = search([torch.randn(8, COLUMNS)], [QuantSpec(3, 32)], statistics(samples))
    assert torch.isfinite(found.in_scale).all()


def test_inputs_that_are_not_finite_name_the_layer():
    samples = inputs()
    samples[2][0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer: its calibration inputs hold NaN"):
        search([torch.randn(8, COLUMNS)], [QuantSpec(3, 32)], statistics(samples))


def test_layers_fed_the_same_tensor_are_found(model):
    names = ["unused", "out", "v", "k", "q"]
    assert shared_inputs(model, names, {"x": inputs()[0]}) == [("q", "k", "v"), ("out",)]


def test_statistics_are_sums_over_all_rows(model):
    samples = inputs()
    (chunk,) = capture(model, ["q", "k", "v", "out"], [{"x": x} for x in samples])
    x = torch.cat(samples).double()
    assert chunk[0].names == ("q", "k", "v")
    torch.testing.assert_close(chunk[0].gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(chunk[0].mean_magnitude.double(), x.abs().mean(0), rtol=1e-6, atol=1e-6)
    assert chunk[0].rows == len(x)


def test_the_memory_budget_changes_the_passes_but_not_the_numbers(model):
    batches = [{"x": x} for x in inputs()]
    names = ["q", "k", "v", "out"]
    whole = [entry for chunk in capture(model, names, batches) for entry in chunk]
    passes = model.after
    chunks = list(capture(model, names, batches, budget=1))
    assert [len(chunk) for chunk in chunks] == [1, 1]
    # One pass to find shared inputs and the first chunk's run to the end; the last chunk's stops inside `out`.
    assert model.after - passes == passes == 1 + len(batches)
    for one, other in zip(whole, (entry for chunk in chunks for entry in chunk), strict=True):
        assert torch.equal(one.gram, other.gram)
        assert torch.equal(one.magnitude, other.magnitude)


def test_no_hook_is_left_behind(model):
    list(capture(model, ["q", "out"], [{"x": x} for x in inputs()], budget=1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_shared_in_one_sample_only_are_an_error(model):
    def forward(x):
        other = x if len(x) == 5 else x.clone()
        return model.q(x) + model.k(other)

    model.forward = forward
    with pytest.raises(RuntimeError, match="k shared its input with q in the first sample"):
        list(capture(model, ["q", "k"], [{"x": x} for x in inputs()]))


def solved(model, batches, budget=1 << 30, bits=3):
    spec, backend = QuantSpec(bits, 32), AwqBackend()
    items = {}
    for chunk in capture(model, ["q", "k", "v", "out", "unused"], batches, budget):
        for entry in chunk:
            layers = [getattr(model, name) for name in entry.names]
            items |= zip(entry.names, backend.solve(layers, [spec] * len(layers), entry), strict=True)
    return items


def test_the_same_inputs_give_the_same_codes_whatever_the_budget(model):
    batches = [{"x": x} for x in inputs(outliers=5)]
    one, other = solved(model, batches), solved(copy.deepcopy(model), batches, budget=1)
    for name in one:
        for key, value in one[name].layer.state_dict().items():
            assert torch.equal(value, other[name].layer.state_dict()[key]), f"{name}.{key}"


def test_layers_of_one_group_share_their_scale_and_the_model_stays_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    items = solved(model, [{"x": x} for x in inputs(outliers=5)])
    assert set(items) == {"q", "k", "v", "out"}
    assert torch.equal(items["q"].layer.in_scale, items["v"].layer.in_scale)
    assert not torch.equal(items["q"].layer.in_scale, items["out"].layer.in_scale)
    assert 0 < items["q"].output_error < 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_without_inputs_is_rounded_to_nearest(model):
    layer = AwqBackend().without_inputs(model.unused, QuantSpec(3, 32))
    rounded = round_to_nearest(model.unused.weight.detach(), QuantSpec(3, 32), torch.float32)
    assert torch.equal(layer.weight, rounded.dequantize(3, torch.float32))
    assert layer.in_scale is None


@torch.no_grad()
def test_the_group_keeps_its_outputs_better_than_rounding(model):
    samples = inputs(outliers=10)
    items = solved(model, [{"x": x} for x in samples])
    for names in (("q", "k", "v"), ("out",)):
        assert sum(items[name].output_error for name in names) < 1
    x = torch.cat(samples)
    spec = QuantSpec(3, 32)
    calibrated = plain = 0.0
    for name in ("q", "k", "v"):
        linear = getattr(model, name)
        calibrated += float((items[name].layer(x) - linear(x)).square().sum())
        rounded = round_to_nearest(linear.weight.detach(), spec, torch.float32).dequantize(3, torch.float32)
        plain += output_error(linear.weight.detach(), rounded, samples)
    assert calibrated < 0.6 * plain
