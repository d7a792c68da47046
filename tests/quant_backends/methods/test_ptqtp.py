"""PTQTP: two trits per weight, exactly where that is possible, the paper's fit or better elsewhere."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.layers.ternary import (
    TritPlaneLinear,
    TritPlanes,
    pack_trits,
    trit_bytes,
    unpack_trits,
)
from lmms_plugin.quant_backends.methods.gptq import factorize
from lmms_plugin.quant_backends.methods.ptqtp import (
    STARTS,
    PtqtpBackend,
    TernaryGrid,
    WeightedPtqtpBackend,
    choose_with_feedback,
    fit_planes,
)
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

SPEC = QuantSpec(3, 32)


def normal(rows=16, columns=96, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_trits(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def relative(stored, weight):
    return float((stored.double() - weight.double()).norm() / weight.double().norm())


def statistics(x):
    entry = InputStatistics(
        ("layer",), torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1], dtype=torch.float64)
    )
    entry.add(x)
    return entry


def inputs(columns=96, rows=300, heavy=1.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns // 4, generator=generator) @ torch.randn(columns // 4, columns, generator=generator)
    x += torch.randn(rows, columns, generator=generator)
    x[:, ::10] *= heavy
    return x


def linear(rows=16, columns=96, dtype=torch.float32, bias=False):
    torch.manual_seed(1)
    return nn.Linear(columns, rows, bias=bias).to(dtype)


class TestTrits:
    def test_every_byte_that_five_trits_can_make(self):
        every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8)
        packed = pack_trits(every)
        assert packed.shape == (243, 1)
        assert packed.unique().numel() == 243
        assert torch.equal(unpack_trits(packed, 5), every)

    @pytest.mark.parametrize("columns", [1, 4, 5, 6, 128, 300, 3420])
    def test_rows_of_any_length_survive(self, columns):
        trits = random_trits(3, columns)
        packed = pack_trits(trits)
        assert packed.shape == (3, trit_bytes(columns)) == (3, -(-columns // 5))
        assert torch.equal(unpack_trits(packed, columns), trits)

    def test_each_row_is_packed_for_itself(self):
        trits = random_trits(4, 33)
        assert torch.equal(pack_trits(trits)[1:3], pack_trits(trits[1:3]))


class TestLayer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_forward_is_a_linear_layer_with_the_dense_weight(self, dtype):
        dense = linear(dtype=dtype, bias=True)
        layer = PtqtpBackend().quantize_linear(dense.weight, dense.bias, SPEC)
        x = normal(5, seed=9, dtype=dtype).view(1, 5, 96)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, dense.bias))
        assert layer.weight.dtype == layer(x).dtype == dtype
        assert torch.equal(layer.dense_rows(3, 7), layer.weight[3:7])
        assert relative(layer.weight, dense.weight.detach()) < 0.2

    @pytest.mark.parametrize(
        ("columns", "group_size", "expected"),
        # 1.6 bits a trit, and two 16-bit scales a group.
        [(640, 128, 3.2 + 0.25), (640, 64, 3.2 + 0.5), (640, 32, 3.2 + 1), (640, None, 3.2 + 0.05)],
    )
    def test_bits_per_weight_are_those_of_the_storages(self, columns, group_size, expected):
        layer = PtqtpBackend().quantize_linear(normal(8, columns, dtype=torch.bfloat16), None, QuantSpec(3, group_size))
        storages = [buffer.untyped_storage().nbytes() for buffer in layer.buffers()]
        assert 8 * sum(storages) / (8 * columns) == pytest.approx(expected)
        assert layer.weight_bytes == sum(storages)
        assert layer.bits == 3

    @pytest.mark.parametrize(("columns", "group_size"), [(300, 128), (3420, 128), (7, 128), (96, 32)])
    def test_a_last_group_that_is_shorter_is_fitted_like_any_other_and_nothing_is_padded(self, columns, group_size):
        weight = normal(4, columns)
        layer = PtqtpBackend().quantize_linear(weight, None, QuantSpec(3, group_size))
        assert layer.padded_columns == 0
        assert layer.weight.shape == weight.shape
        start = columns // group_size * group_size if columns % group_size else columns - group_size
        alone = PtqtpBackend().quantize_linear(weight[:, start:], None, QuantSpec(3, group_size))
        assert torch.equal(layer.weight[:, start:], alone.weight)

    def test_state_dict_round_trip(self):
        dense = linear(bias=True)
        layer = PtqtpBackend().quantize_linear(dense.weight, dense.bias, SPEC)
        empty = TritPlaneLinear(96, 16, SPEC, bias=True)
        empty.load_state_dict(layer.state_dict())
        x = normal(2)
        assert torch.equal(empty(x), layer(x))

    def test_trits_are_kept_when_the_dtype_changes(self):
        layer = PtqtpBackend().quantize_linear(normal(), None, SPEC)
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert torch.equal(half.planes, layer.planes)
        assert half.weight.dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32


class TestFit:
    def test_one_ternary_plane_is_recovered_to_the_last_bit(self):
        trits = random_trits(50, 128)
        scale = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)) + 0.01
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = scale.to(dtype) * trits
            assert torch.equal(fit_planes(weight, 128).dequantize(128, dtype), weight)
            assert torch.equal(fit_planes(weight, 128, starts=1).dequantize(128, dtype), weight)

    @pytest.mark.parametrize("ratio", [1, 1.25, 1.5, 2, 2.5, 3, 4, 7, 20])
    def test_two_planes_are_recovered_whatever_their_scales(self, ratio):
        # Scales of few digits, so that no sum of the two is rounded.
        scale = torch.arange(1, 65).unsqueeze(1) / 64
        first, second = random_trits(64, 128, seed=1), random_trits(64, 128, seed=2)
        weight = scale * ratio * first + scale * second
        assert torch.equal(fit_planes(weight, 128).dequantize(128, torch.float32), weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_fitted_weight_is_its_own_fit(self, dtype):
        once = fit_planes(normal(dtype=dtype), 32).dequantize(32, dtype)
        again = fit_planes(once, 32).dequantize(32, dtype)
        assert relative(again, once) < 4 * torch.finfo(dtype).eps

    def test_a_group_by_hand(self):
        # Levels 0, 1, 2, 3, 4 times 0.1: uniform, with scales 0.3 and 0.1.
        weight = torch.tensor([[0.0, 0.1, -0.2, 0.3, -0.4, 0.4]])
        planes = fit_planes(weight, None)
        torch.testing.assert_close(planes.scale, torch.tensor([[[0.3, 0.1]]]))
        assert planes.planes[0].tolist() == [[0, 0, -1, 1, -1, 1]]
        assert planes.planes[1].tolist() == [[0, 1, 1, 0, -1, 1]]

    @pytest.mark.parametrize("weight", [torch.zeros(2, 64), torch.full((2, 64), -0.5), torch.eye(64)[:2]], ids=str)
    @pytest.mark.parametrize("starts", [1, STARTS])
    def test_degenerate_groups_are_exact(self, weight, starts):
        assert torch.equal(fit_planes(weight, 32, starts=starts).dequantize(32, torch.float32), weight)

    @pytest.mark.parametrize("group_size", [16, 128])
    def test_one_start_is_the_papers_algorithm(self, group_size):
        weight = normal(40, group_size, seed=4)
        ours = fit_planes(weight, None, starts=1).dequantize(None, torch.float32).double()
        found = (ours - weight).square().sum(1)
        expected = np.array([paper_error(row) for row in weight.double().numpy()])
        # Ties at the start (both planes are equal) can be broken either way: a few groups end elsewhere.
        same = np.isclose(found.numpy(), expected, rtol=1e-4)
        assert same.mean() >= 0.9
        assert found.sum() == pytest.approx(expected.sum(), rel=0.01)

    def test_more_starts_are_never_worse_than_the_papers_and_on_the_whole_better(self):
        weight = normal(200, 128)
        errors = [
            (fit_planes(weight, None, starts=starts).dequantize(None, torch.float32) - weight).square().sum(1)
            for starts in range(1, STARTS + 1)
        ]
        for more in errors[1:]:
            # Up to the rounding of the scales to float32.
            assert (more <= errors[0] * (1 + 1e-5)).all()
        totals = [float(error.sum()) for error in errors]
        assert totals == sorted(totals, reverse=True)
        assert totals[-1] < 0.95 * totals[0]

    @pytest.mark.parametrize("starts", [1, STARTS])
    def test_stopping_early_keeps_the_best_so_far(self, starts):
        weight = normal(200, 128)
        errors = [
            (fit_planes(weight, None, starts=starts, max_iterations=limit).dequantize(None, torch.float32) - weight)
            .square()
            .sum(1)
            for limit in (1, 2, 5, 50, 500)
        ]
        for earlier, later in itertools.pairwise(errors):
            # Up to the rounding of the scales to float32.
            assert (later <= earlier * (1 + 1e-5)).all()
        assert errors[0].sum() > 1.05 * errors[-1].sum()
        assert torch.equal(errors[-1], errors[-2]), "50 iterations are enough here"

    @pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 5, 96)], ids=["plain", "weighted"])
    def test_rows_and_groups_know_nothing_of_one_another(self, importance):
        weight = normal(40)
        whole = fit_planes(weight, 32, importance)
        for rows in (slice(0, 1), slice(7, 23)):
            part = fit_planes(weight[rows], 32, importance)
            assert torch.equal(part.scale, whole.scale[rows])
            assert torch.equal(part.planes, whole.planes[:, rows])

    def test_the_same_weight_gives_the_same_planes(self):
        one, other = fit_planes(normal(), 32), fit_planes(normal(), 32)
        assert torch.equal(one.planes, other.planes)
        assert torch.equal(one.scale, other.scale)

    def test_columns_that_weigh_nothing_have_no_say_in_the_scales(self):
        importance = torch.ones(64)
        importance[1::2] = 0
        weight = torch.zeros(1, 64)
        weight[:, ::2] = 0.75 * random_trits(1, 32)
        weight[:, 1::2] = 2 + torch.rand(1, 32, generator=torch.Generator().manual_seed(0))
        stored = fit_planes(weight, None, importance).dequantize(None, torch.float32)
        torch.testing.assert_close(stored[:, ::2], weight[:, ::2], rtol=1e-4, atol=1e-4)

    def test_only_the_ratios_of_importance_count(self):
        importance = torch.rand(96, generator=torch.Generator().manual_seed(0))
        one, other = (fit_planes(normal(), 32, importance * factor) for factor in (1, 1024))
        assert torch.equal(one.planes, other.planes)

    def test_importance_lowers_the_error_that_it_weighs(self):
        importance = torch.ones(96)
        importance[::10] = 300
        weight = normal(50)
        plain, weighted = (
            (fit_planes(weight, 32, each).dequantize(32, torch.float32) - weight).square() @ importance
            for each in (None, importance)
        )
        assert weighted.sum() < 0.5 * plain.sum()

    @settings(max_examples=60)
    @given(
        st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=40),
        st.one_of(st.none(), st.integers(1, 50)),
    )
    def test_any_weights_are_nearer_than_with_one_plane_and_scales_in_order(self, values, group_size):
        weight = torch.tensor([values])
        planes = fit_planes(weight, group_size)
        stored = planes.dequantize(group_size, torch.float32)
        assert torch.isfinite(stored).all()
        assert (planes.scale >= 0).all()
        assert (planes.scale[..., 0] >= planes.scale[..., 1]).all()
        one_plane = weight.abs().mean() * weight.sign()
        if group_size is None:
            assert (stored - weight).norm() <= (one_plane - weight).norm() * (1 + 1e-5) + 1e-6

    @settings(max_examples=40)
    @given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=10), st.floats(0, 1), st.floats(0, 1))
    def test_trits_are_the_nearest_of_all_nine_sums(self, values, one, other):
        scale = torch.tensor(sorted([one, other], reverse=True))
        trits = TernaryGrid.of(scale).nearest(torch.tensor(values))
        stored = (trits * scale.view(2, 1)).sum(0)
        pairs = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2))).float()
        nearest = (torch.tensor(values).unsqueeze(1) - pairs @ scale).abs().amin(1)
        torch.testing.assert_close((torch.tensor(values) - stored).abs(), nearest, rtol=1e-5, atol=1e-6)

    def test_nearer_than_three_bits_and_farther_than_four(self):
        weight = normal(100, 128)
        trits = relative(fit_planes(weight, 128).dequantize(128, torch.float32), weight)
        three, four = (
            relative(round_by_blocks(weight, QuantSpec(bits, 128)).dequantize(bits, torch.float32), weight)
            for bits in (3, 4)
        )
        assert four < trits < 0.8 * three


def paper_error(weight, iterations=50):
    """Algorithm 1 of the paper, spelled out for one group: (n,) weights -> the squared error it ends with."""
    tuples = sorted(itertools.product((0, 1, -1), repeat=2), key=lambda pair: np.abs(pair).sum())
    planes = np.stack([np.sign(weight), np.sign(weight)], 1)
    scales = np.ones(2)
    for _ in range(iterations):
        ridge, normal_matrix = 1e-8, planes.T @ planes
        while ridge < 1 and np.linalg.cond(normal_matrix + ridge * np.eye(2), "fro") > 1e6:
            ridge *= 10
        before = scales
        scales = np.linalg.solve(normal_matrix + ridge * np.eye(2), planes.T @ weight)
        distances = np.stack([(weight - np.array(pair) @ scales) ** 2 for pair in tuples])
        planes = np.array(tuples)[distances.argmin(0)]
        if np.linalg.norm(scales - before) < 1e-4:
            break
    return float(((weight - planes @ scales) ** 2).sum())


class TestWeighted:
    @pytest.mark.parametrize("heavy", [1.0, 20.0])
    @pytest.mark.parametrize("feedback", [False, True], ids=["alone", "feedback"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_row_is_worse_than_without_inputs_and_the_report_is_true(self, dtype, feedback, heavy):
        layer, x = linear(dtype=dtype, bias=True), inputs(heavy=heavy)
        backend = WeightedPtqtpBackend(feedback=feedback)
        entry = statistics(x)
        solution = backend.solve([layer], [SPEC], entry)[0]
        plain = backend.without_inputs(layer, SPEC)
        weight = layer.weight.detach().double()
        weighted, unweighted = (
            (x.double() @ (stored.weight.double() - weight).T).square().sum(0) for stored in (solution.layer, plain)
        )
        assert (weighted <= unweighted * (1 + 1e-6)).all()
        if feedback or heavy > 1:
            assert weighted.sum() < 0.7 * unweighted.sum()
        measured = float(weighted.sum().sqrt() / (x.double() @ weight.T).norm())
        assert entry.output_error(layer.weight, solution.layer) == pytest.approx(measured, rel=1e-4)
        assert solution.layer.bias is layer.bias

    def test_without_inputs_it_is_the_data_free_method(self):
        layer = linear()
        assert torch.equal(
            WeightedPtqtpBackend().without_inputs(layer, SPEC).weight,
            PtqtpBackend().quantize_linear(layer.weight, None, SPEC).weight,
        )

    def test_inputs_that_are_all_alike_leave_the_data_free_fit(self):
        layer = linear()
        entry = InputStatistics(("layer",), torch.eye(96), torch.zeros(96, dtype=torch.float64), 1)
        solution = WeightedPtqtpBackend().solve([layer], [SPEC], entry)[0]
        assert torch.equal(solution.layer.weight, PtqtpBackend().quantize_linear(layer.weight, None, SPEC).weight)

    def test_columns_and_layers_without_inputs_break_nothing(self):
        layer, x = linear(), inputs()
        x[:, 32:64] = 0
        dead_group = WeightedPtqtpBackend().solve([layer], [SPEC], statistics(x))[0]
        assert relative(dead_group.layer.weight[:, 32:64], layer.weight.detach()[:, 32:64]) < 0.2
        entry = statistics(torch.zeros(3, 96))
        silent = WeightedPtqtpBackend().solve([layer], [SPEC], entry)[0]
        assert entry.output_error(layer.weight, silent.layer) == 0
        assert relative(silent.layer.weight, layer.weight.detach()) < 0.2

    def test_inputs_that_are_not_finite_name_the_layer(self):
        x = inputs()
        x[0, 0] = torch.nan
        with pytest.raises(ValueError, match="layer: its calibration inputs hold NaN"):
            WeightedPtqtpBackend().solve([linear()], [SPEC], statistics(x))

    def test_the_same_inputs_give_the_same_planes(self):
        solve = lambda: WeightedPtqtpBackend().solve([linear()], [SPEC], statistics(inputs()))[0].layer  # noqa: E731
        one, other = solve(), solve()
        assert torch.equal(one.planes, other.planes)
        assert torch.equal(one.scale, other.scale)

    def test_feedback_with_independent_inputs_is_the_nearest_choice(self):
        weight = normal()
        fitted = fit_planes(weight, 32)
        entry = InputStatistics(("layer",), torch.rand(96).diag(), torch.zeros(96, dtype=torch.float64), 1)
        chosen = choose_with_feedback(weight, fitted.scale, 32, factorize(entry))
        assert torch.equal(chosen.planes, fitted.planes)


class TestOptions:
    @pytest.mark.parametrize("name", ["ptqtp", "ptqtp_weighted"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"starts": 0}, "starts must be an integer from 1 to 5, got 0"),
            ({"starts": 6}, "starts must be an integer from 1 to 5, got 6"),
            ({"max_iterations": 0}, "max_iterations must be a positive integer, got 0"),
        ],
    )
    def test_bad_options_are_refused(self, name, options, message):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            get(name, **options)

    def test_bad_damping_is_refused(self):
        with pytest.raises(ValueError, match="damping must be a number from 0 to 10"):
            get("ptqtp_weighted", damping=-1.0)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_other_bits_are_refused(self, bits):
        with pytest.raises(ValueError, match=f"ptqtp cannot quantize to {bits} bits"):
            get("ptqtp").check(QuantPlan.from_arguments(bits=bits))

    def test_its_own_bits_are_the_default(self):
        assert get("ptqtp").default_bits == get("ptqtp_weighted").default_bits == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_finds_the_same_planes():
    here, there = fit_planes(normal(), 32), fit_planes(normal().cuda(), 32)
    assert isinstance(there, TritPlanes)
    assert torch.equal(there.planes.cpu(), here.planes)
    assert torch.equal(there.scale.cpu(), here.scale)
