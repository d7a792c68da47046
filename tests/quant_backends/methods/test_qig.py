"""QIG beside a plain integration along the path, and the scale search by its weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.methods.qig import clipped_shares, token_importance
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.methods.scale_search import EXPONENTS, candidates
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import InputStatistics

COLUMNS = 64
SPEC = QuantSpec(3, 32)


def layers(*rows):
    torch.manual_seed(0)
    return [nn.Linear(COLUMNS, count, bias=False) for count in rows]


def tokens(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.randn(COLUMNS, generator=generator).exp()
    return torch.randn(count, COLUMNS, generator=generator) * loudness


def rounded(weight, spec=SPEC):
    return round_to_nearest(weight, spec, torch.float32).dequantize(spec.bits, torch.float32)


def gathered(x):
    entry = InputStatistics.empty(("one", "other"), COLUMNS, torch.device("cpu"), keeps_rows=True)
    for part in x.chunk(5):
        entry.add(part)
    return entry


def integrated_gradients(group, x, steps=32):
    """(x − 0) times the mean gradient at evenly spaced points of the path, by automatic differentiation, in float64."""
    x = x.double()
    total = torch.zeros_like(x)
    for alpha in torch.linspace(0, 1, steps, dtype=torch.float64):
        point = (alpha * x).requires_grad_()
        changes = [point @ (layer.weight.double() - rounded(layer.weight).double()).T for layer in group]
        torch.cat(changes, 1).abs().mean(1).sum().backward()
        total += point.grad / steps
    return (x * total).detach()


def plain_shares(importance):
    """The clipping of the paper, written with numpy."""
    shares = importance / importance.sum()
    low, high = np.quantile(shares, [0.25, 0.75])
    clipped = np.clip(shares, low - 1.5 * (high - low), high + 1.5 * (high - low))
    return clipped / clipped.sum()


@pytest.mark.parametrize("rows", [(16,), (24, 8, 8)], ids=["one layer", "three layers"])
def test_weights_are_those_of_a_plain_integration(rows):
    group, x = layers(*rows), tokens()
    errors = [(rounded(layer.weight) - layer.weight).detach() for layer in group]
    found = token_importance(x, errors)
    expected = integrated_gradients(group, x).abs().mean(1)
    torch.testing.assert_close(found / found.sum(), (expected / expected.sum()).float(), rtol=1e-4, atol=0)
    np.testing.assert_allclose(clipped_shares(found).numpy(), plain_shares(expected.numpy()), rtol=1e-4)


def test_attributions_add_up_to_the_error_of_the_outputs():
    """Completeness: a positive input is worth what it does, so that importance is the error where all agree in sign."""
    error = torch.tensor([[0.5, 0.25], [0.1, 0.2]])
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert torch.allclose(2 * token_importance(x, [error]), (x @ error.T).abs().sum(1))


def test_outliers_are_clipped_at_the_fence():
    importance = torch.tensor([1.0, 2.0, 3.0, 4.0, 1000.0])
    # Quartiles 2 and 4: the fence is 4 + 1.5 · 2 = 7.
    torch.testing.assert_close(clipped_shares(importance), torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0]) / 17)


@pytest.mark.parametrize("importance", [torch.zeros(4), torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 5.0])])
def test_where_nothing_is_left_all_tokens_weigh_the_same(importance):
    assert torch.equal(clipped_shares(importance), torch.full_like(importance, 1 / len(importance)))


@torch.no_grad()
@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_that_of_a_plain_loop(loss, seed):
    group, x = layers(16, 8), tokens(seed=seed)
    shares = torch.tensor(plain_shares(integrated_gradients_of(group, x)))
    entry, losses = gathered(x), []
    inverses = candidates(entry.mean_magnitude, torch.float32)
    for inverse in inverses:
        changes = [x @ (rounded(layer.weight / inverse) * inverse - layer.weight).T for layer in group]
        costs = torch.cat(changes, 1).abs() if loss == "mae" else torch.cat(changes, 1).square()
        losses.append(float(shares @ costs.mean(1).double()))
    best = losses.index(min(losses))
    found = get("qig", loss=loss).solve(group, [SPEC] * 2, entry)
    for solution in found:
        assert torch.equal(solution.layer.in_scale, inverses[best])
    assert 0 < best < len(EXPONENTS) - 1, "the search has something to choose"


def integrated_gradients_of(group, x):
    with torch.enable_grad():
        return integrated_gradients(group, x).abs().mean(1).numpy()


@pytest.mark.model
def test_through_the_whole_model(checkpoint):
    path = checkpoint("qwen2_5_vl")
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    spec = CalibrationSpec("noise", samples=2)
    batches, _ = build_batches(
        model, processor, spec, spec.load_samples(), dialect_for(model.config.model_type), keep_logits=False
    )
    work = quantize(copy.deepcopy(model), get("qig"), QuantPlan(language=SPEC, vision=SPEC), batches)
    reports = [report for report in work.modules() if report.reason is None]
    assert {report.method for report in reports} == {"qig"}
    assert {report.component for report in reports} == {"language", "vision"}
    assert all(0 < report.output_error < 1 for report in reports)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="qig's loss must be mae or mse, got 'huber'"):
        get("qig", loss="huber")
    with pytest.raises(ValueError, match="qig: activation_format=int8 was asked for, but its importance is that of"):
        get("qig", activation_format="int8")
