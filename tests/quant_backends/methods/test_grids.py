"""Round-to-nearest and HQQ: what each promises about the error of a weight."""

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.layers.codes import all_finite
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.methods.rtn_grid import nearest_values, round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(rows=32, columns=256, seed=0):
    """Return a weight with a few large entries, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 / 10


def stored(method, matrix, spec):
    """Return the dense matrix that a data-free backend stores for `matrix`."""
    return PackedLinear.from_codes(get(method).quantize(matrix, spec), spec, matrix.shape[1]).weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_errs_by_at_most_half_a_step(bits, symmetric, dtype):
    spec = QuantSpec(bits, 64, symmetric)
    matrix = weight().to(dtype).float()
    codes = round_to_nearest(matrix, spec, dtype)
    error = (codes.dequantize(bits, torch.float32) - matrix).abs().view(32, 4, 64)
    half_step = codes.scale.float().unsqueeze(-1) / 2
    assert (error <= half_step * (1 + 1e-4)).all()
    assert int(codes.codes.max()) == (1 << bits) - 1, "the grid reaches the top code somewhere"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [64, 48, None], ids=["whole groups", "padded groups", "one group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_values_on_the_grid_are_those_of_the_codes(symmetric, group_size, dtype):
    spec, matrix = QuantSpec(3, group_size, symmetric), weight().to(dtype).float()
    codes = round_to_nearest(matrix, spec, dtype)
    assert torch.equal(nearest_values(matrix.clone(), spec, dtype), codes.dequantize(3, torch.float32)[:, :256])


def test_a_weight_on_the_grid_is_kept_exactly():
    codes = torch.randint(0, 16, (4, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    matrix = (codes - 8).float() * 0.25
    assert torch.equal(stored("rtn", matrix, QuantSpec(4, 32)), matrix)


def test_symmetric_grid_by_hand():
    codes = round_to_nearest(torch.tensor([[-3.0, 0.0, 1.0, 3.0]]), QuantSpec(2, 4, True), torch.float32)
    # Step 2·3/3 = 2: levels -4, -2, 0, 2; 3 is clipped to 2 and -3 ties to the even level -4.
    assert codes.scale.tolist() == [[2.0]]
    assert codes.dequantize(2, torch.float32).tolist() == [[-4.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_value_that_is_not_finite_is_found(dtype):
    matrix = weight().to(dtype)
    assert all_finite(matrix)
    assert all_finite(matrix[:0])
    for value in (torch.nan, torch.inf, -torch.inf):
        damaged = matrix.clone()
        damaged[3, 5] = value
        assert not all_finite(damaged)


def test_a_group_of_zeros_stays_zero():
    for symmetric in (True, False):
        assert not stored("rtn", torch.zeros(2, 64), QuantSpec(4, 32, symmetric)).any()


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_the_error_falls_with_the_bits(method):
    matrix = weight()
    widths = sorted(get(method).bits)
    errors = [float((stored(method, matrix, QuantSpec(bits, 64)) - matrix).norm()) for bits in widths]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_smaller_groups_fit_better(method):
    matrix = weight()
    errors = [float((stored(method, matrix, QuantSpec(3, size)) - matrix).norm()) for size in (32, 128, -1)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("round_zero", [True, False], ids=["round_zero", "real zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_equals_the_library(bits, dtype, round_zero):
    """Dequantized weights equal those of ``HQQLinear``, bit for bit."""
    linear = nn.Linear(256, 48, bias=False).to(dtype)
    matrix = linear.weight.detach().clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    config["weight_quant_params"]["round_zero"] = round_zero
    library = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    found = get("hqq", round_zero=round_zero).quantize(matrix, QuantSpec(bits, 64)).dequantize(bits, dtype)
    assert torch.equal(found, library.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_hqq_leaves_small_weights_small_at_little_cost_to_the_others(bits):
    """In real language models the channel with by far the largest inputs has small weights: it is they that count."""
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    matrix[:, 17] *= 0.01
    started, real = (
        get("hqq", round_zero=value).quantize(matrix, QuantSpec(bits, 64)).dequantize(bits, torch.float32) - matrix
        for value in (True, False)
    )
    assert started[:, 17].norm() < 0.75 * real[:, 17].norm()
    assert started.norm() < 1.02 * real.norm()


@pytest.mark.parametrize("columns", [300, 342])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_widths_that_no_group_divides(method, columns):
    matrix = weight(columns=columns)
    error = (stored(method, matrix, QuantSpec(8, 128)) - matrix).norm() / matrix.norm()
    assert error < 0.02


@pytest.mark.parametrize(
    ("method", "spec", "message"),
    [
        ("hqq", QuantSpec(7, 64), "hqq cannot quantize to 7 bits"),
        ("hqq", QuantSpec(4, 64, True), "cannot be symmetric"),
        ("none", QuantSpec(4, 64), "none leaves every layer at 16 bits"),
    ],
    ids=["bits", "symmetric", "none"],
)
def test_what_a_backend_cannot_do_is_refused(method, spec, message):
    with pytest.raises(ValueError, match=message):
        get(method).check(QuantPlan(language=spec))


@pytest.mark.parametrize("method", ["rtn", "hqq", "awq"])
def test_an_empty_plan_is_refused(method):
    with pytest.raises(ValueError, match="quantize nothing"):
        get(method).check(QuantPlan())
