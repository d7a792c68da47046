"""GPTQ: the textbook's codes, rounding where inputs are independent, and never worse than rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.methods import gptq
from lmms_plugin.quant_backends.methods.gptq import (
    DAMPINGS,
    GptqBackend,
    choose_factor,
    factorize,
    pass_on_errors,
    round_with_feedback,
)
from lmms_plugin.quant_backends.methods.rtn import RtnBackend
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics, held_back_rows, squared_errors

ROWS, COLUMNS = 24, 96


def correlated(columns=COLUMNS, rows=400, seed=0, heavy=1.0):
    """Return inputs (rows, columns) whose channels share a few causes, some of them `heavy` times larger."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, max(1, columns // 4), generator=generator)
    x = causes @ torch.randn(causes.shape[1], columns, generator=generator)
    x += 0.5 * torch.randn(rows, columns, generator=generator)
    x[:, :: max(1, columns // 5)] *= heavy
    return x


def statistics(x):
    entry = InputStatistics(
        ("layer",), torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1], dtype=torch.float64)
    )
    entry.add(x)
    return entry


def held_back(x, samples=8):
    """Return the statistics of inputs that came in so many samples, some of them held back."""
    entry = InputStatistics.empty(("layer",), x.shape[1], torch.device("cpu"), holds_back=True)
    for index, part in enumerate(x.chunk(samples)):
        entry.add(part, held_back=held_back_rows(index, samples))
    return entry


def drawn(rows, seed, shared):
    """Return inputs (rows, columns) of one distribution, correlated the more the larger `shared` is."""
    mixing = torch.randn(COLUMNS // 4, COLUMNS, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(rows, COLUMNS // 4, generator=generator)
    return shared * causes @ mixing + torch.randn(rows, COLUMNS, generator=generator)


def from_gram(gram):
    return InputStatistics(("layer",), gram, torch.zeros(len(gram), dtype=torch.float64), 1)


def linear(rows=ROWS, columns=COLUMNS, seed=1, dtype=torch.float32, bias=False):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias).to(dtype)


def codes_of(layer, spec, entry, **options):
    """Return (rows, columns) codes without the padding's."""
    factor = factorize(entry, **options)
    nearest = round_by_blocks(layer.weight.detach(), spec)
    corrected = round_with_feedback(layer.weight.detach(), nearest, spec.bits, factor)
    return corrected.codes.flatten(1)[:, : layer.in_features]


def row_errors(layer, stored, x):
    """Return Σ (x · (w − ŵ))² of each row, measured with the inputs themselves."""
    return (x.double() @ (stored.double() - layer.weight.detach().double()).T).square().sum(0)


def textbook(weight, spec, gram, act_order, damping):
    """GPTQ as the paper derives it (equations 2 and 3), in float64 and without any factorization: a column is rounded,
    the others move by the inverse Hessian's column, and the rounded one is eliminated from that inverse."""
    nearest = round_by_blocks(weight, spec)
    size = nearest.codes.shape[-1]
    zero = torch.full_like(nearest.scale, 1 << (spec.bits - 1)) if spec.symmetric else nearest.zero_point
    columns = weight.shape[1]
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(hessian)
    moved = weight.double().clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    for column in order.tolist():
        scale, offset = nearest.scale[:, column // size].double(), zero[:, column // size].double()
        code = (moved[:, column] / scale).round().add(offset).clamp(0, (1 << spec.bits) - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (moved[:, column] - (code - offset) * scale) / inverse[column, column]
        moved -= error.unsqueeze(1) * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("group_size", [32, 40, None], ids=["dividing", "not_dividing", "whole_row"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_textbook(bits, symmetric, group_size, act_order):
    layer, entry = linear(), statistics(correlated(heavy=3))
    spec = QuantSpec(bits, group_size, symmetric)
    expected = textbook(layer.weight.detach(), spec, entry.gram, act_order, 0.01)
    assert torch.equal(codes_of(layer, spec, entry, act_order=act_order), expected)


@pytest.mark.parametrize("damping", [0.0, 0.001, 0.1, 1.0])
def test_damping_is_the_textbooks(damping):
    layer, entry = linear(), statistics(correlated())
    spec = QuantSpec(4, 32)
    expected = textbook(layer.weight.detach(), spec, entry.gram, True, damping)
    assert torch.equal(codes_of(layer, spec, entry, damping=damping), expected)


def test_a_column_makes_up_for_the_one_before_that_moves_with_it():
    # One group from 0 to 3 in steps of 1; the first two inputs are the same, so that only the sum of their weights
    # matters: rounding makes 0 + 0 of 0.4 + 0.4, the best is 0 + 1.
    layer = linear(1, 3)
    layer.weight.data = torch.tensor([[0.4, 0.4, 3.0]])
    x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert round_by_blocks(layer.weight.detach(), QuantSpec(2, None)).codes.flatten().tolist() == [0, 0, 3]
    assert codes_of(layer, QuantSpec(2, None), statistics(x)).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("scales", ["identity", "diagonal"])
@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_that_have_nothing_to_do_with_one_another_leave_rounding(bits, act_order, scales):
    diagonal = torch.ones(COLUMNS) if scales == "identity" else torch.rand(COLUMNS, generator=torch.Generator()) * 100
    layer, spec = linear(), QuantSpec(bits, 32)
    solution = GptqBackend(act_order=act_order).solve([layer], [spec], from_gram(diagonal.diag()))[0]
    expected = RtnBackend().quantize_linear(layer.weight.detach(), None, spec)
    assert torch.equal(solution.layer.weight, expected.weight)


@pytest.mark.parametrize("heavy", [1.0, 30.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_nearer_than_by_rounding_and_the_report_says_how_near(dtype, bits, heavy):
    layer, x = linear(dtype=dtype), correlated(heavy=heavy)
    spec = QuantSpec(bits, 32)
    entry = statistics(x)
    solution = GptqBackend().solve([layer], [spec], entry)[0]
    calibrated = row_errors(layer, solution.layer.weight, x)
    rounded = row_errors(layer, RtnBackend().quantize_linear(layer.weight.detach(), None, spec).weight, x)
    assert (calibrated <= rounded * (1 + 1e-6)).all()
    # At 8 bits of a bfloat16 layer the rounding of the dense weights' own dtype is a good part of the error.
    assert calibrated.sum() < (0.9 if bits == 8 and dtype == torch.bfloat16 else 0.6) * rounded.sum()
    exact = x.double() @ layer.weight.detach().double().T
    reported = entry.output_error(layer.weight, solution.layer)
    assert reported == pytest.approx(float(calibrated.sum().sqrt() / exact.norm()), rel=1e-4)


@pytest.mark.parametrize("rows", [24, 48, 96, 192, 768])
@pytest.mark.parametrize("shared", [0.0, 0.1, 0.3], ids=["independent", "hardly correlated", "correlated"])
def test_on_inputs_that_it_has_not_seen_it_is_no_worse_than_rounding(shared, rows):
    """Judged by the inputs it is fitted to, it is 1.5 to 1.7 times as far off here with fewer inputs than columns."""
    spec = QuantSpec(3, 32)
    for seed in range(4):
        layer, fresh = linear(64, seed=seed), drawn(4000, 1000 + seed, shared)
        found = GptqBackend().solve([layer], [spec], held_back(drawn(rows, seed, shared)))[0].layer.weight
        rounded = RtnBackend().quantize_linear(layer.weight.detach(), None, spec).weight
        ratio = row_errors(layer, found, fresh).sum() / row_errors(layer, rounded, fresh).sum()
        # A choice by few inputs may be wrong by a little.
        assert ratio.sqrt() < 1.03
        if rows > COLUMNS and shared == 0.3:
            assert ratio.sqrt() < 0.9


def test_damping_grows_where_few_inputs_say_little():
    rounding = torch.ones(COLUMNS, dtype=torch.float64)
    few, many = (choose_factor(held_back(drawn(rows, 0, 0.3)), rounding).damping for rows in (24, 20_000))
    assert few > many == DAMPINGS[0]
    assert choose_factor(held_back(drawn(24, 0, 0.3)), rounding, damping=0.05).damping == 0.05
    assert choose_factor(statistics(drawn(24, 0, 0.3)), rounding).damping == DAMPINGS[0]


def test_the_expected_error_is_the_mean_over_rounding_errors():
    """Which damping is best is told without rounding: checked against errors drawn at random, handed on by the rows."""
    entry = held_back(drawn(60, 0, 0.3))
    rounding = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)).double()
    noise = torch.randn(4000, COLUMNS, generator=torch.Generator().manual_seed(4)) * rounding.sqrt().float()
    means = []
    for damping in DAMPINGS:
        stored = torch.zeros(4000, COLUMNS)

        def choose(column, wanted, stored=stored):
            stored[:, column] = wanted + noise[:, column]
            return stored[:, column]

        pass_on_errors(torch.zeros(4000, COLUMNS), factorize(entry, damping=damping), choose)
        means.append(float(squared_errors(stored, entry.held_back.gram).mean()))
    assert choose_factor(entry, rounding).damping == DAMPINGS[means.index(min(means))]


@pytest.mark.parametrize("columns", [16, gptq.PROBES, 65, 300, 600])
def test_the_expected_error_is_its_formula(columns):
    """Exactly for few columns; for many as nearly as random signs tell, 2 ‖A‖² / probes being the variance at most."""
    x, variance = correlated(columns, 200), torch.rand(columns, generator=torch.Generator().manual_seed(1)).double()
    factor, gram = factorize(statistics(x)), torch.from_numpy(x[::4].numpy().T @ x[::4].numpy())
    spread = torch.linalg.inv(factor.feedback.double()) * variance.sqrt()
    whole = spread.T @ gram.double() @ spread
    found = gptq.expected_error(factor.feedback, gram, gptq.rounding_errors(variance))
    deviation = 0.0 if columns <= gptq.PROBES else float((2 * whole.square().sum() / gptq.PROBES).sqrt())
    assert found == pytest.approx(float(whole.trace()), rel=1e-4, abs=4 * deviation)
    assert deviation < 0.1 * float(whole.trace())


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_layers_that_are_rounded_together_get_the_codes_that_they_get_alone(method, monkeypatch):
    layers = [linear(rows, seed=seed) for seed, rows in enumerate((32, 16, 16, 24))]
    specs = [QuantSpec(3, 32), QuantSpec(3, 32), QuantSpec(4, 32), QuantSpec(4, 32, True)]
    entry = held_back(correlated())
    entry.mismatch = 0.1 * entry.gram.triu(1) if method == "gptaq" else None
    plain = [get(method).round(layer.weight, spec) for layer, spec in zip(layers, specs, strict=True)]
    assert gptq.joined(layers, specs, plain) == [(0, 2), (2, 3), (3, 4)]
    together = get(method).solve(layers, specs, entry)
    monkeypatch.setattr(gptq, "JOINED_ROWS", 0)
    assert gptq.joined(layers, specs, plain) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for one, other in zip(together, get(method).solve(layers, specs, entry), strict=True):
        assert one.plain_rows == other.plain_rows
        assert torch.equal(one.layer.weight, other.layer.weight)


def test_without_an_input_held_back_there_is_no_reason_to_move():
    layer, spec = linear(), QuantSpec(3, 32)
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), holds_back=True)
    entry.add(correlated())
    solution = GptqBackend().solve([layer], [spec], entry)[0]
    assert torch.equal(solution.layer.weight, GptqBackend().without_inputs(layer, spec).weight)


def solved_error(layer, entry, spec, **options):
    (solution,) = GptqBackend(**options).solve([layer], [spec], entry)
    return entry.output_error(layer.weight, solution.layer)


def test_error_falls_with_bits():
    layer, entry = linear(), statistics(correlated())
    errors = [solved_error(layer, entry, QuantSpec(bits, 32)) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    # Each bit halves the step: from 3 to 8 bits about 1/32.
    assert errors[1] / errors[6] == pytest.approx(32, rel=0.5)


def test_large_inputs_first_is_better_where_inputs_differ():
    layer, entry = linear(), statistics(correlated(heavy=30))
    spec = QuantSpec(3, 32)
    first, given_order = (solved_error(layer, entry, spec, act_order=act_order) for act_order in (True, False))
    assert first < given_order


def test_the_order_of_rounding_follows_the_columns_when_they_change_places():
    layer, x = linear(), correlated(heavy=5)
    places = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(2))
    moved = linear()
    moved.weight.data = layer.weight.data[:, places]
    spec = QuantSpec(4, None)
    assert torch.equal(codes_of(moved, spec, statistics(x[:, places])), codes_of(layer, spec, statistics(x))[:, places])


@pytest.mark.parametrize("block_size", [1, 7, 96, 1000])
def test_blocks_are_only_for_speed(block_size):
    layer, entry = linear(bias=True), statistics(correlated())
    spec = QuantSpec(4, 32)
    one = GptqBackend(block_size=block_size).solve([layer], [spec], entry)[0]
    other = GptqBackend().solve([layer], [spec], entry)[0]
    assert torch.equal(one.layer.weight, other.layer.weight)
    assert one.layer.bias is layer.bias


def test_the_number_of_calibration_rows_does_not_count_only_their_directions():
    layer, entry = linear(), statistics(correlated())
    spec = QuantSpec(3, 32)
    assert torch.equal(codes_of(layer, spec, entry), codes_of(layer, spec, from_gram(entry.gram / 1024)))


@pytest.mark.parametrize(("columns", "group_size"), [(100, 64), (300, 128), (90, 128)])
def test_columns_of_padding_stay_zero_and_disturb_nothing(columns, group_size):
    layer, x = linear(columns=columns), correlated(columns)
    spec = QuantSpec(4, group_size)
    packed = GptqBackend().solve([layer], [spec], statistics(x))[0].layer
    assert packed.padded_columns == -columns % min(columns, group_size)
    stored = packed.quantized
    padding = stored.codes.flatten(1)[:, columns:]
    assert torch.equal(padding, stored.zero_point[:, -1:].expand_as(padding))
    assert torch.equal(packed.quantized.codes.flatten(1)[:, :columns], codes_of(layer, spec, statistics(x)))


def test_columns_whose_input_is_always_zero_are_rounded():
    layer, x = linear(), correlated()
    dead = torch.tensor([0, 31, 50, 95])
    x[:, dead] = 0
    spec = QuantSpec(3, 32)
    found = codes_of(layer, spec, statistics(x))
    assert torch.equal(found[:, dead], round_by_blocks(layer.weight.detach(), spec).codes.flatten(1)[:, dead])
    assert not torch.equal(found, round_by_blocks(layer.weight.detach(), spec).codes.flatten(1))


def test_a_layer_whose_inputs_are_all_zero_is_rounded():
    layer, spec = linear(), QuantSpec(4, 32)
    entry = statistics(torch.zeros(5, COLUMNS))
    solution = GptqBackend().solve([layer], [spec], entry)[0]
    assert torch.equal(solution.layer.weight, GptqBackend().without_inputs(layer, spec).weight)
    assert entry.output_error(layer.weight, solution.layer) == 0


def test_fewer_inputs_than_columns_are_enough_and_damping_grows_when_it_must():
    layer, x = linear(), correlated(rows=10)
    x[:, 1] = x[:, 0]
    said = []
    handler = logger.add(said.append, format="{message}")
    assert factorize(statistics(x), damping=0.01).damping == 0.01
    assert not said
    grown = factorize(statistics(x), damping=0.0).damping
    logger.remove(handler)
    assert grown > 0
    assert f"layer: its 10 calibration inputs take more damping than 0: {grown:g} was added" in said[0]
    entry = statistics(x)
    solution = GptqBackend(damping=0.0).solve([layer], [QuantSpec(4, 32)], entry)[0]
    assert torch.isfinite(solution.layer.weight).all()
    rounded = RtnBackend().quantize_linear(layer.weight.detach(), None, QuantSpec(4, 32))
    assert entry.output_error(layer.weight, solution.layer) < entry.output_error(layer.weight, rounded)


def test_moments_of_no_real_input_are_an_error():
    gram = torch.eye(COLUMNS)
    gram[0, 1] = gram[1, 0] = -1000
    with pytest.raises(ValueError, match=r"layer: the second moments .* have no Cholesky factor"):
        GptqBackend().solve([linear()], [QuantSpec(4, 32)], from_gram(gram))


def test_inputs_that_are_not_finite_name_the_layer():
    x = correlated()
    x[3, 3] = torch.inf
    with pytest.raises(ValueError, match="layer: its calibration inputs hold NaN"):
        GptqBackend().solve([linear()], [QuantSpec(4, 32)], statistics(x))


def test_layers_of_a_group_are_solved_each_to_its_own_spec():
    layers, specs = [linear(seed=1), linear(rows=8, seed=2)], [QuantSpec(4, 32), QuantSpec(2, 16, symmetric=True)]
    entry = statistics(correlated())
    together = GptqBackend().solve(layers, specs, entry)
    for layer, spec, solution in zip(layers, specs, together, strict=True):
        alone = GptqBackend().solve([layer], [spec], entry)[0]
        assert torch.equal(solution.layer.weight, alone.layer.weight)
        assert (solution.layer.bits, solution.layer.group_size) == (spec.bits, spec.group_size)


def test_the_dense_layer_is_left_as_it_was():
    layer, entry = linear(), statistics(correlated())
    weight, gram = layer.weight.detach().clone(), entry.gram.clone()
    GptqBackend().solve([layer], [QuantSpec(4, 32)], entry)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(entry.gram, gram)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    group_size=st.one_of(st.none(), st.integers(1, 50)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    samples=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_whatever_the_layer_no_row_is_worse_than_rounded(
    rows, columns, group_size, bits, symmetric, act_order, samples, seed
):
    layer, x = linear(rows, columns, seed), correlated(columns, samples, seed, heavy=10)
    spec, entry = QuantSpec(bits, group_size, symmetric), held_back(x, min(samples, 5))
    backend = GptqBackend(act_order=act_order)
    first, again = (backend.solve([layer], [spec], entry)[0] for _ in range(2))
    assert torch.equal(first.layer.weight, again.layer.weight)
    gram = entry.held_back.gram
    calibrated = squared_errors(first.layer.weight - layer.weight.detach(), gram)
    rounded = squared_errors(backend.without_inputs(layer, spec).weight - layer.weight.detach(), gram)
    # Compared as they were chosen: by the same float32 sums, which may be off by their rounding.
    assert (calibrated <= rounded).all()
    plain = (first.layer.weight == backend.without_inputs(layer, spec).weight).all(1)
    assert first.plain_rows <= int(plain.sum())


def test_rows_that_stay_rounded_are_counted():
    # On a grid of four steps it happens that what would make up for earlier errors is clipped.
    layer, x = linear(64, 40, seed=2), correlated(40, 10, 2, heavy=100)
    spec, entry = QuantSpec(2, None, symmetric=True), statistics(x)
    (solution,) = GptqBackend(act_order=False).solve([layer], [spec], entry)
    factor = factorize(entry, act_order=False)
    plain = round_by_blocks(layer.weight.detach(), spec)
    corrected = round_with_feedback(layer.weight.detach(), plain, 2, factor)
    errors = [row_errors(layer, codes.dequantize(2, torch.float32), x) for codes in (plain, corrected)]
    worse = errors[1] > errors[0]
    assert 0 < int(worse.sum()) < 64
    assert solution.plain_rows == int(worse.sum())
    assert torch.equal(solution.layer.weight[worse], plain.dequantize(2, torch.float32)[worse])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.1}, "damping must be a number from 0 to 10, got -0.1"),
        ({"damping": float("nan")}, "damping must be a number from 0 to 10, got nan"),
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get("gptq", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_finds_the_same_weights():
    layer, entry = linear(), statistics(correlated())
    here = GptqBackend().solve([layer], [QuantSpec(4, 32)], entry)[0]
    there = GptqBackend().solve([layer.cuda()], [QuantSpec(4, 32)], from_gram(entry.gram.cuda()))[0]
    assert there.layer.weight.is_cuda
    errors = [entry.output_error(layer.cpu().weight, solution.layer.cpu()) for solution in (there, here)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
