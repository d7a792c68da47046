"""Errors of quantized layers on inputs that no calibration has seen."""

import copy

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.held_out import held_out_errors, output_errors
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.methods.rtn import nearest
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec


class Model(nn.Module):
    """A used layer, one after it, and one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = (nn.Linear(32, 32, bias=index > 0) for index in range(3))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def packed(layer, bits):
    return nearest(layer, QuantSpec(bits, 32))


@torch.no_grad()
def test_errors_are_those_of_outputs_over_all_batches():
    dense = Model()
    quantized = copy.deepcopy(dense)
    for name in ("first", "second", "idle"):
        quantized.set_submodule(name, packed(getattr(dense, name), 3))
    xs = [torch.randn(2, 5, 32), 10 * torch.randn(7, 32)]
    errors = output_errors(dense, quantized, ["first", "second", "idle"], [{"x": x} for x in xs])
    assert errors["idle"] is None
    rows = torch.cat([x.reshape(-1, 32) for x in xs]).double()
    weight, kept = dense.first.weight.double(), quantized.first.weight.double()
    expected = float((rows @ (weight - kept).T).norm() / (rows @ weight.T).norm())
    assert errors["first"] == pytest.approx(expected, rel=1e-4)
    # The second layer is fed what the dense first one makes, so that errors do not add up.
    hidden = torch.relu(rows @ weight.T)
    difference = hidden @ (dense.second.weight.double() - quantized.second.weight.double()).T
    outputs = hidden @ dense.second.weight.double().T + dense.second.bias.double()
    assert errors["second"] == pytest.approx(float(difference.norm() / outputs.norm()), rel=1e-4)
    assert not dense.first._forward_hooks, "nothing stays behind"


def test_errors_fall_with_bits_and_no_layer_is_left_out(checkpoint):
    from lmms_plugin.protocol.dialects import DIALECTS

    path = str(checkpoint("qwen2_5_vl"))
    dense = load_quantized(path, backend=get("none"), plan=QuantPlan())
    errors = {}
    for bits in (2, 4, 8):
        plan = QuantPlan.from_arguments(bits=bits, group_size=32, vision_bits=bits, head_bits=bits)
        loaded = load_quantized(path, backend=get("rtn"), plan=plan)
        names = [module.name for module in loaded.report.quantized]
        found = held_out_errors(
            dense.model,
            loaded.model,
            names,
            processor=loaded.processor,
            dialect=DIALECTS["demo"],
            samples=1,
            seed=1,
        )
        assert list(found) == names
        report = loaded.report.with_held_out_errors(found)
        assert [module.held_out_error for module in report.quantized] == list(found.values())
        errors[bits] = list(found.values())
    assert all(two > four > eight > 0 for two, four, eight in zip(*errors.values(), strict=True))


def test_another_seed_gives_other_inputs(checkpoint):
    from lmms_plugin.protocol.dialects import DIALECTS
    from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec

    loaded = load_quantized(str(checkpoint("qwen2_5_vl")), backend=get("none"), plan=QuantPlan())
    prints = set()
    for seed in (0, 1, 0):
        spec = CalibrationSpec("self", samples=1, seed=seed)
        _, report = build_batches(
            loaded.model, loaded.processor, spec, spec.load_samples(), DIALECTS["demo"], keep_logits=True
        )
        prints.add(report.sha256)
    assert len(prints) == 2
