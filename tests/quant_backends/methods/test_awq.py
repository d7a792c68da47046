"""AWQ: never worse than rounding on what it was calibrated on, better where channels differ, always the same."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.formats.entries import format_of
from lmms_plugin.quant_backends.methods import scale_search
from lmms_plugin.quant_backends.methods.awq import AwqBackend
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.methods.scale_search import (
    CLIPPING_RATIOS,
    EXPONENTS,
    SEARCH_ELEMENTS,
    GramError,
    RowError,
    candidates,
    least_error,
    search_clipping,
    search_scales,
)
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import InputStatistics, squared_errors

COLUMNS = 64


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


def search(weight, spec, entry):
    return search_scales([weight], [spec], entry.mean_magnitude, GramError(entry.gram))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return [nn.Linear(COLUMNS, rows) for rows in (64, 32, 32)]


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
    found = search(weight, spec, statistics(samples))
    scaled = round_to_nearest(weight / found.in_scale, spec, torch.float32)
    calibrated = output_error(weight, scaled.dequantize(bits, torch.float32) * found.in_scale, samples)
    rounded = round_to_nearest(weight, spec, torch.float32).dequantize(bits, torch.float32)
    plain = output_error(weight, rounded, samples)
    assert calibrated <= plain * (1 + 1e-5)
    if outliers >= 3:
        assert calibrated < 0.9 * plain
        assert found.exponent > 0


@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True], ids=["scales", "scales and clipping"])
def test_the_reported_error_is_that_of_the_outputs(clip):
    linear = nn.Linear(COLUMNS, 32)
    samples = inputs(outliers=3)
    entry = statistics(samples)
    (solution,) = AwqBackend(clip=clip).solve([linear], [QuantSpec(3, 32)], entry)
    x = torch.cat(samples)
    exact = linear(x)
    expected = (solution.layer(x) - exact).norm() / (exact - linear.bias).norm()
    assert entry.output_error(linear.weight, solution.layer) == pytest.approx(float(expected), rel=1e-4)


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
    found = search(torch.randn(8, COLUMNS), QuantSpec(3, 32), statistics(samples))
    assert torch.isfinite(found.in_scale).all()


def test_inputs_that_are_not_finite_name_the_layer():
    samples = inputs()
    samples[2][0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer: its calibration inputs hold NaN"):
        AwqBackend().solve([nn.Linear(COLUMNS, 8)], [QuantSpec(3, 32)], statistics(samples))


def solve(layers, samples, bits=3, **options):
    entry = statistics(samples)
    entry.names = tuple(f"layers.0.self_attn.{key}_proj" for key in "qkv")[: len(layers)]
    return AwqBackend(**options).solve(layers, [QuantSpec(bits, 32)] * len(layers), entry)


def test_layers_of_one_group_share_their_scale_and_stay_as_they_are(layers):
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    solutions = solve(layers, inputs(outliers=5))
    for layer, solution, state in zip(layers, solutions, before, strict=True):
        assert torch.equal(solution.layer.in_scale, solutions[0].layer.in_scale)
        assert 0 < statistics(inputs(outliers=5)).output_error(layer.weight, solution.layer) < 1
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    alone = solve(layers[1:2], inputs(outliers=5, seed=1))
    assert not torch.equal(alone[0].layer.in_scale, solutions[0].layer.in_scale)


def test_the_same_inputs_give_the_same_codes(layers):
    for one, other in zip(*(solve(copy.deepcopy(layers), inputs(outliers=5)) for _ in range(2)), strict=True):
        for key, value in one.layer.state_dict().items():
            assert torch.equal(value, other.layer.state_dict()[key])


def test_a_layer_without_inputs_is_rounded_to_nearest(layers):
    layer = AwqBackend().without_inputs(layers[0], QuantSpec(3, 32))
    rounded = round_to_nearest(layers[0].weight.detach(), QuantSpec(3, 32), torch.float32)
    assert torch.equal(layer.weight, rounded.dequantize(3, torch.float32))
    assert layer.in_scale is None


@torch.no_grad()
def test_the_group_keeps_its_outputs_better_than_rounding(layers):
    samples, spec = inputs(outliers=10), QuantSpec(3, 32)
    x = torch.cat(samples)
    calibrated = plain = 0.0
    for linear, solution in zip(layers, solve(layers, samples), strict=True):
        calibrated += float((solution.layer(x) - linear(x)).square().sum())
        rounded = round_to_nearest(linear.weight, spec, torch.float32).dequantize(3, torch.float32)
        plain += output_error(linear.weight, rounded, samples)
    assert calibrated < 0.6 * plain


def straightforward_search(weight, spec, samples, power):
    """Return the exponent of the authors' loop: round, multiply, compare, one candidate after another."""
    x = torch.cat(samples)
    magnitude, exact = x.abs().mean(0), x @ weight.T
    losses = []
    for exponent in EXPONENTS:
        scale = magnitude.pow(exponent).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = round_to_nearest(weight * scale, spec, torch.float32).dequantize(spec.bits, torch.float32)
        losses.append(float(((x / scale) @ rounded.T - exact).abs().pow(power).sum()))
    return EXPONENTS[losses.index(min(losses))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("power", [1, 2], ids=["absolute", "squared"])
@pytest.mark.parametrize("outliers", [1.0, 5.0, 30.0])
def test_the_search_finds_what_the_authors_loop_finds(outliers, power, seed):
    weight = torch.randn(48, COLUMNS, generator=torch.Generator().manual_seed(seed))
    samples, spec = inputs(outliers=outliers, seed=seed), QuantSpec(3, 16)
    entry = statistics(samples)
    x = torch.cat(samples)
    objective = GramError(entry.gram) if power == 2 else RowError(x, torch.ones(len(x)), power)
    found = search_scales([weight], [spec], entry.mean_magnitude, objective)
    assert found.exponent == straightforward_search(weight, spec, samples, power)


@pytest.mark.parametrize("form", [None, "nvfp4", "mxfp4"])
@pytest.mark.parametrize("seed", range(6))
def test_candidates_are_given_up_without_missing_the_best(form, seed, monkeypatch):
    """With 1,024 rows most candidates are compared in a part of them; the result is that of all of them in all."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1024, COLUMNS, generator=generator) * torch.rand(1024, 1, generator=generator).exp()
    entry, spec = statistics(inputs(12, outliers=3.0 * seed + 3, seed=seed)), QuantSpec(3, 32)
    inverses = candidates(entry.mean_magnitude, torch.float32)
    compared = []

    class Counting(GramError):
        def errors_of(self, inverses):
            errors = super().errors_of(inverses)

            def counted(rounded, dense):
                compared.append(len(rounded) * len(dense))
                return errors(rounded, dense)

            return counted

    asked = [weight, weight[:256].flip(1)], [spec] * 2, inverses, Counting(entry.gram)
    kind = None if form is None else format_of(form)
    early = least_error(*asked, kind)
    fewer, all_of_them = sum(compared), len(inverses) * (1024 + 256)
    compared.clear()
    monkeypatch.setattr(scale_search, "GIVEN_UP", 1e9)
    assert early == least_error(*asked, kind)
    assert fewer < 0.7 * all_of_them == 0.7 * sum(compared)


def test_gram_and_rows_measure_the_same_squared_error():
    weight = torch.randn(16, COLUMNS, generator=torch.Generator().manual_seed(0))
    samples = inputs(outliers=2)
    x = torch.cat(samples)
    rounded = torch.stack([(weight * 4).round() / 4, (weight * 2).round() / 2])
    inverses = torch.stack([torch.ones(COLUMNS), torch.linspace(0.5, 2, COLUMNS)])
    objectives = GramError(x.T @ x), RowError(x, torch.ones(len(x)), 2)
    by_gram, by_rows = (objective.errors_of(inverses)(rounded.clone(), weight) for objective in objectives)
    torch.testing.assert_close(by_gram, by_rows, rtol=1e-4, atol=0)
    expected = [
        ((x @ (part * inverse - weight).T) ** 2).sum(0) for part, inverse in zip(rounded, inverses, strict=True)
    ]
    torch.testing.assert_close(by_rows.float(), torch.stack(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
def test_squared_errors_are_those_of_the_outputs(columns):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(900, columns, generator=generator) * torch.rand(columns, generator=generator).exp()
    delta = torch.randn(9, columns, generator=generator)
    exact = (x.double() @ delta.double().T).square().sum(0)
    torch.testing.assert_close(squared_errors(delta, x.T @ x), exact, rtol=1e-5, atol=0)


def row_errors(weight, kept, samples):
    return (torch.cat(samples) @ (weight - kept).T).square().sum(0)


@pytest.mark.parametrize("group_size", [16, 24, None], ids=["whole groups", "padded groups", "one group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_raises_the_error_of_no_row(bits, symmetric, group_size):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, COLUMNS, generator=generator) * torch.rand(40, COLUMNS, generator=generator).exp()
    samples, spec = inputs(outliers=4), QuantSpec(bits, group_size, symmetric)
    x = torch.cat(samples)
    codes = search_clipping(weight, spec, x.T @ x, torch.float32)
    clipped = row_errors(weight, codes.dequantize(bits, torch.float32)[:, :COLUMNS], samples)
    rounded = round_to_nearest(weight, spec, torch.float32).dequantize(bits, torch.float32)[:, :COLUMNS]
    plain = row_errors(weight, rounded, samples)
    assert (clipped <= plain * (1 + 1e-4)).all()
    if bits <= 3:
        assert clipped.sum() < 0.95 * plain.sum()


def test_clipping_is_the_best_range_where_groups_do_not_meet():
    """With uncorrelated inputs each group stands alone, and the best range is that of an exhaustive loop."""
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(3, 16)
    codes = search_clipping(weight, spec, torch.eye(32), torch.float32)
    found = codes.dequantize(3, torch.float32)
    for row in range(12):
        for group in (slice(0, 16), slice(16, 32)):
            part = weight[row : row + 1, group]
            errors = []
            for ratio in CLIPPING_RATIOS:
                limit = part.abs().max() * ratio
                kept = round_to_nearest(part.clamp(-limit, limit), spec, torch.float32).dequantize(3, torch.float32)
                errors.append(float((kept - part).square().sum()))
            assert float((found[row, group] - part[0]).square().sum()) == pytest.approx(min(errors), rel=1e-5)


def test_clipping_does_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch):
    weight, spec = torch.randn(37, COLUMNS, generator=torch.Generator().manual_seed(0)), QuantSpec(3, 16)
    x = torch.cat(inputs(outliers=3))
    whole = search_clipping(weight, spec, x.T @ x, torch.float32)
    monkeypatch.setitem(SEARCH_ELEMENTS, "cpu", 8 * COLUMNS * len(CLIPPING_RATIOS))
    for one, other in zip(whole, search_clipping(weight, spec, x.T @ x, torch.float32), strict=True):
        assert torch.equal(one, other)


def test_clipped_layers_keep_their_outputs_better_and_queries_and_keys_stay_as_they_are(layers):
    samples = inputs(outliers=5)
    plain, clipped = solve(layers, samples, bits=2), solve(layers, samples, bits=2, clip=True)
    for index in (0, 1):
        assert torch.equal(clipped[index].layer.weight, plain[index].layer.weight)
    entry = statistics(samples)
    errors = [entry.output_error(layers[2].weight, solutions[2].layer) for solutions in (clipped, plain)]
    assert errors[0] < errors[1]
    assert torch.equal(clipped[2].layer.in_scale, plain[2].layer.in_scale)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_clipping_raises_the_output_error_of_no_layer_of_a_model(checkpoint, family):
    plan = QuantPlan.from_arguments(bits=2, group_size=24, vision_bits=3)
    errors = []
    for clip in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(checkpoint(family)).eval()
        processor = AutoProcessor.from_pretrained(checkpoint(family))
        spec = CalibrationSpec("noise", 2)
        dialect = dialect_for(model.config.model_type)
        drawn = [sample._replace(image=sample.image.resize((64, 48))) for sample in spec.load_samples()]
        batches, _ = build_batches(model, processor, spec, drawn, dialect, keep_logits=False)
        work = quantize(model, AwqBackend(clip=clip), plan, batches)
        errors.append({entry.name: entry.output_error for entry in work.modules() if entry.output_error is not None})
    plain, clipped = errors
    assert plain.keys() == clipped.keys()
    assert all(clipped[name] <= plain[name] * (1 + 1e-4) for name in plain)
    assert sum(clipped.values()) < 0.95 * sum(plain.values())
