"""GPTAQ: the paper's recursion in float64, GPTQ where nothing differs, and inputs of both models side by side."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.methods.gptaq import pull_of
from lmms_plugin.quant_backends.methods.gptq import factorize, round_with_feedback
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import InputStatistics, held_back_rows
from tests.helpers.recorder import SPEC, Recorder

ROWS, COLUMNS = 24, 96


def pairs(rows=600, seed=0, drift=0.15):
    """Return inputs (rows, columns), and the same mixed up and noisy, as they are after quantized blocks."""
    mixing = torch.randn(COLUMNS // 4, COLUMNS, generator=torch.Generator().manual_seed(99))
    moved = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(98)) / COLUMNS**0.5
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, COLUMNS // 4, generator=generator) @ mixing
    dense += 0.5 * torch.randn(rows, COLUMNS, generator=generator)
    return dense, dense + drift * dense @ moved + 0.05 * torch.randn(rows, COLUMNS, generator=generator)


def statistics(dense, x, **kept):
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), **kept)
    for index, (one, other) in enumerate(zip(dense.chunk(8), x.chunk(8), strict=True)):
        entry.add(other, held_back=held_back_rows(index, 8), dense=one)
    return entry


def linear(seed=1):
    torch.manual_seed(seed)
    return nn.Linear(COLUMNS, ROWS, bias=False)


def authors(weight, spec, dense, x, alpha, act_order, damping=0.01):
    """GPTAQ's algorithm as published (H⁻¹'s Cholesky factor U, P = α triu(ΔXXᵀ Uᵀ, 1) U), in float64, on our grid."""
    nearest = round_by_blocks(weight, spec)
    size = nearest.codes.shape[-1]
    zero = nearest.zero_point if nearest.zero_point is not None else torch.full_like(nearest.scale, 1 << spec.bits - 1)
    dense, x = dense.double(), x.double()
    hessian, mismatch = x.T @ x, (dense - x).T @ x
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(COLUMNS)
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    hessian, mismatch = hessian[order][:, order], mismatch[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pull = alpha * (mismatch @ upper.T).triu(1) @ upper
    moved, codes = weight.double()[:, order].clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for step, column in enumerate(order.tolist()):
        scale, offset = nearest.scale[:, column // size].double(), zero[:, column // size].double()
        wanted = moved[:, step].clone()
        code = (wanted / scale).round().add(offset).clamp(0, (1 << spec.bits) - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (wanted - (code - offset) * scale) / upper[step, step]
        moved[:, step:] -= torch.outer(error, upper[step, step:]) - torch.outer(wanted, pull[step, step:])
    return codes


@torch.no_grad()
@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(2, False, 32), (3, True, None), (4, False, 40)])
def test_codes_are_those_of_the_published_algorithm(bits, symmetric, group_size, alpha, act_order):
    layer, (dense, x), spec = linear(), pairs(), QuantSpec(bits, group_size, symmetric)
    entry = statistics(dense, x)
    factor = factorize(entry, act_order)
    factor = factor._replace(pull=alpha * pull_of(entry.fitting_mismatch, factor))
    nearest = round_by_blocks(layer.weight, spec)
    expected = authors(layer.weight, spec, dense, x, alpha, act_order)
    for block_size in (128, 7):
        found = round_with_feedback(layer.weight, nearest, bits, factor, block_size)
        agree = (found.codes.flatten(1)[:, :COLUMNS] == expected).float().mean()
        assert agree > 0.995, "up to ties that float32 and float64 see differently, and what follows from them"
    plain = round_with_feedback(layer.weight, nearest, bits, factor._replace(pull=None))
    assert (plain.codes.flatten(1)[:, :COLUMNS] != expected).float().mean() > 0.005, "the mismatch makes a difference"


@torch.no_grad()
def test_it_is_gptq_where_inputs_are_the_same_or_nothing_is_passed_on():
    layer, (dense, x), spec = linear(), pairs(), QuantSpec(3, 32)
    (gptq,) = get("gptq").solve([layer], [spec], statistics(x, x, holds_back=True))
    (same,) = get("gptaq", alpha=1.0).solve([layer], [spec], statistics(x, x, holds_back=True))
    assert torch.equal(same.layer.weight, gptq.layer.weight)
    assert same.method is None
    unpaired = statistics(dense, x, holds_back=True)
    unpaired.mismatch = unpaired.held_back.mismatch = None
    (without,) = get("gptaq", alpha=1.0).solve([layer], [spec], unpaired)
    assert torch.equal(without.layer.weight, gptq.layer.weight)
    assert without.method == "gptaq, symmetric"


@torch.no_grad()
def test_outputs_are_nearer_to_those_of_the_unquantized_model():
    layer, spec = linear(), QuantSpec(3, 32)
    entry = statistics(*pairs(2000), holds_back=True)
    dense, x = pairs(2000, seed=5)

    def error(weight):
        return float((x @ weight.T - dense @ layer.weight.T).norm() / (dense @ layer.weight.T).norm())

    errors = {
        alpha: error(get("gptaq", alpha=alpha).solve([layer], [spec], entry)[0].layer.weight) for alpha in (0.0, 1.0)
    }
    rounded = error(round_by_blocks(layer.weight, spec).dequantize(3, torch.float32))
    assert errors[1.0] < 0.9 * errors[0.0]
    assert errors[1.0] < 0.9 * rounded


@torch.no_grad()
def test_rows_are_judged_by_the_unquantized_models_outputs():
    layer, (dense, x) = linear(), pairs()
    entry = statistics(dense, x, holds_back=True)
    backend = get("gptaq")
    deltas = [0.1 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    held = torch.cat([torch.arange(600).chunk(8)[index] for index in (3, 7)])
    exact = [
        (
            (x[held].double() @ (layer.weight + delta).double().T - dense[held].double() @ layer.weight.double().T) ** 2
        ).sum(0)
        for delta in deltas
    ]
    found = [backend.judge(delta, layer.weight, entry) for delta in deltas]
    torch.testing.assert_close(found[0] - found[1], exact[0] - exact[1], rtol=1e-3, atol=1e-2)


def inputs_of(name, model, batches):
    """Return the inputs of a layer over plain forward passes, (rows, columns) float64."""
    fed = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: fed.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )
    for batch in batches:
        model(**batch)
    hook.remove()
    return torch.cat(fed)


class Pairing(Recorder):
    sequential = True
    asymmetric = True


@torch.no_grad()
@pytest.mark.model
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_every_input_is_paired_with_the_unquantized_models(checkpoint, family):
    """Against plain forward passes of both models: the first layers of a block are fed by the blocks before alone."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family)).eval()
    processor, spec = AutoProcessor.from_pretrained(checkpoint(family)), CalibrationSpec("noise", samples=2)
    batches, _ = build_batches(model, processor, spec, spec.load_samples(), dialect_for(family), keep_logits=True)
    dense, backend = copy.deepcopy(model), Pairing()
    quantize(model, backend, QuantPlan(language=SPEC), batches)
    names = [name for name in backend.seen if name.endswith("layers.1.self_attn.q_proj")]
    assert names
    for name in names:
        ours, theirs = (inputs_of(name, one, batches) for one in (model, dense))
        expected = (theirs - ours).T @ ours
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(backend.seen[name].mismatch.double(), expected, rtol=1e-3, atol=1e-3 * scale)
    first = next(entry for name, entry in backend.seen.items() if name.endswith("layers.0.self_attn.q_proj"))
    assert not first.mismatch.any()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_bad_options_are_refused(alpha):
    with pytest.raises(ValueError, match="gptaq: alpha must be a number from 0 to 1, got"):
        get("gptaq", alpha=alpha)
    with pytest.raises(ValueError, match="gptaq: block_size must be a positive integer, got 0"):
        get("gptaq", block_size=0)


def test_inputs_that_do_not_correspond_are_an_error():
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"))
    with pytest.raises(ValueError, match="layer was fed \\(3, 96\\) after quantized blocks, but \\(4, 96\\)"):
        entry.add(torch.zeros(3, COLUMNS), dense=torch.zeros(4, COLUMNS))
