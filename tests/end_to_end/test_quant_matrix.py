"""Every backend x bits x component on one family, every backend on every family: it works, or says why it does not.

Works means: each layer that the plan names is quantized to the bits that the plan says, its bytes shrink to them, every
weight is in the report, answers are finite and not those of the dense model. Nothing is a silent no-op.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import BACKENDS, get
from lmms_plugin.quant_backends.backend import CalibratedBackend, WholeModelBackend
from lmms_plugin.quant_backends.calibration.inputs import build_batches, encode, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.calibration.synthetic import scene
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import COMPONENTS, QuantPlan, QuantSpec
from lmms_plugin.quant_backends.quantization import Quantization, tensor_bytes
from lmms_plugin.quant_backends.structure.components import components

GROUP = 32
ALL_BITS = tuple(range(2, 9))
NOT_METHODS = ("none", "prequantized")
WHOLE_MODEL = ("autoround",)
LIBRARIES = {
    "quanto": "optimum.quanto",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "autoround": "auto_round",
}
METHODS = tuple(name for name in BACKENDS if name not in NOT_METHODS)
LAYER_BY_LAYER = tuple(name for name in METHODS if name not in WHOLE_MODEL)

FEWER_STEPS = {"ptqtp": {"starts": 1, "max_iterations": 5}, "ptqtp_weighted": {"starts": 1, "max_iterations": 5}}
"""Options that make a method quicker and no different in kind."""

OVERHEAD = 2.6
"""Bits per weight in float32 that scale and zero point may take in groups of 32: 32 / 32 for each, and what a library
adds per layer (bitsandbytes' table of code values is 16 floats)."""


class Case:
    """One tiny model with what all tests ask of it, made once."""

    def __init__(self, path):
        self.model = AutoModelForImageTextToText.from_pretrained(path)
        self.processor = AutoProcessor.from_pretrained(path)
        self.parts = components(self.model)
        image, expression = scene(np.random.default_rng(0))
        self.inputs = to_model(encode(self.processor, image, f"Where is {expression}?"), self.model)
        self.expected = self.answer(self.model)
        spec = CalibrationSpec("noise", samples=1)
        self.batches, _ = build_batches(
            self.model,
            self.processor,
            spec,
            spec.load_samples(),
            dialect_for(self.model.config.model_type),
            keep_logits=True,
            by_role=True,
        )

    @torch.no_grad()
    def answer(self, model):
        return model(**self.inputs).logits

    def quantize(self, name, plan, **options):
        backend = get(name, **FEWER_STEPS.get(name, {}), **options)
        backend.check(plan)
        work = Quantization(copy.deepcopy(self.model), backend, plan)
        takes_inputs = isinstance(backend, CalibratedBackend | WholeModelBackend)
        work.finish(self.batches if takes_inputs else (), processor=self.processor)
        return work


@pytest.fixture(scope="session")
def case(checkpoint):
    return functools.cache(lambda family: Case(checkpoint(family)))


def available(name):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    return name


def spec_for(name, bits):
    """The spec that this method takes at these bits: libraries fix the symmetry of some grids."""
    return QuantSpec(bits, GROUP, symmetric=name == "autoround" and bits == 8)


def expect_works(case, work, plan):
    """Assert all that "works" means."""
    asked = {name: getattr(plan, part) for name, part in case.parts.items() if getattr(plan, part) is not None}
    layers = {name: m for name, m in work.model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(layers) == set(asked)
    reports = {module.name: module for module in work.modules()}
    for name, spec in asked.items():
        layer, report, dense = layers[name], reports[name], case.model.get_submodule(name)
        assert report.reason is None
        assert report.bits == layer.bits == spec.bits
        assert report.kernel == layer.kernel
        assert report.shape == tuple(dense.weight.shape)
        assert report.bytes_after == sum(t.numel() * t.element_size() for t in layer.buffers())
        assert spec.bits <= 8 * report.bytes_after / report.weights <= spec.bits + OVERHEAD, name
        error = float(((layer.weight - dense.weight).norm() / dense.weight.norm()).detach())
        assert report.relative_error == pytest.approx(error, rel=1e-4)
        # The range of 32 normal weights is about four standard deviations wide: half a step at most, and more where a
        # method gives up precision of the weights for that of the outputs.
        # SmoothQuant does so on purpose, for that of the inputs.
        assert 0 < error < (10 if work.backend.name == "smoothquant" else 5) / 2**spec.bits
    expect_every_weight_in_the_report(case, work, reports, asked)
    got = case.answer(work.model)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, case.expected)


def expect_every_weight_in_the_report(case, work, reports, asked):
    dense = {
        key.removesuffix(".weight"): tensor
        for key, tensor in case.model.named_parameters(remove_duplicate=False)
        if tensor.dim() >= 2
    }
    assert {name.removesuffix(".weight") for name in reports} == set(dense)
    for name, report in reports.items():
        if name not in asked:
            assert report.reason
            assert report.bits is None
            kept = dict(work.model.named_parameters(remove_duplicate=False))
            key = f"{name}.weight" if f"{name}.weight" in kept else name
            assert torch.equal(kept[key], dense[name.removesuffix(".weight")]), f"{name} has changed"
    saved = sum(report.bytes_before - report.bytes_after for report in reports.values())
    assert tensor_bytes(work.model) == tensor_bytes(case.model) - saved
    assert saved > 0


# --- backends x bits x components, on one family ----------------------------------------------------------------------


def squares():
    """Plans in which each component meets every number of bits once: as many plans as the method has bits."""
    for name in LAYER_BY_LAYER:
        bits = sorted(get(name).bits)
        for first in range(len(bits)):
            yield pytest.param(
                name,
                {part: bits[(first + i) % len(bits)] for i, part in enumerate(COMPONENTS)},
                id=f"{name}-{'-'.join(str(bits[(first + i) % len(bits)]) for i in range(len(COMPONENTS)))}",
            )


@pytest.mark.parametrize(("name", "bits"), list(squares()))
def test_bits_by_component(case, name, bits):
    available(name)
    plan = QuantPlan(**{part: spec_for(name, number) for part, number in bits.items()})
    one = case("qwen2_5_vl")
    expect_works(one, one.quantize(name, plan), plan)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_a_component_alone(case, name, component):
    """The others stay as they are, to the bit."""
    available(name)
    plan = QuantPlan(**{component: spec_for(name, max(get(name).bits & {3, 4}))})
    one = case("qwen2_5_vl")
    expect_works(one, one.quantize(name, plan), plan)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("name", METHODS)
def test_bits_that_a_method_cannot_do_are_refused_with_those_it_can(name, bits):
    backend = get(name)
    plan = QuantPlan(language=spec_for(name, bits))
    if bits in backend.bits:
        available(name)
        backend.check(plan)
        return
    able = ", ".join(str(number) for number in sorted(backend.bits))
    with pytest.raises(ValueError, match=f"{bits}( bits|-bit weights).*it can: {able}"):
        backend.check(plan)


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} was asked to quantize nothing"):
        get(name).check(QuantPlan())


# --- backends on every family -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_every_family(case, name, family):
    """Tower, connector and decoder at once, where the family's connector has linear layers at all."""
    available(name)
    one = case(family)
    spec = spec_for(name, max(get(name).bits & {3, 4}))
    plan = QuantPlan(vision=spec, language=spec, connector=spec if "connector" in one.parts.values() else None)
    expect_works(one, one.quantize(name, plan), plan)


@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_a_connector_without_linear_layers_is_refused(case, name):
    one = case("gemma3")
    spec = spec_for(name, max(get(name).bits & {3, 4}))
    with pytest.raises(ValueError, match=r"asks to quantize connector, but in this model it has no nn\.Linear"):
        Quantization(copy.deepcopy(one.model), get(name), QuantPlan(connector=spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYER_BY_LAYER)
def test_sixteen_bit_models(case, name, dtype):
    available(name)
    one = case("idefics3")
    spec = spec_for(name, max(get(name).bits & {3, 4}))
    model = copy.deepcopy(one.model).to(dtype)
    backend = get(name, **FEWER_STEPS.get(name, {}))
    inputs = {k: v.to(dtype) if torch.is_floating_point(v) else v for k, v in one.inputs.items()}
    batches = [
        {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        for batch in one.batches
    ]
    work = Quantization(model, backend, QuantPlan(vision=spec, language=spec))
    work.finish(batches if isinstance(backend, CalibratedBackend) else ())
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    for module in work.modules():
        if module.reason is None:
            assert spec.bits < 8 * module.bytes_after / module.weights < 16
            assert math.isfinite(module.relative_error)


# --- methods that take the whole model --------------------------------------------------------------------------------


@pytest.mark.slow
def test_autoround(case):
    """Real tuning steps; mixed bits; the library's weights, packed."""
    available("autoround")
    one = case("qwen2_5_vl")
    plan = QuantPlan(vision=QuantSpec(3, GROUP), language=QuantSpec(4, GROUP, symmetric=True))
    expect_works(one, one.quantize("autoround", plan, iters=2), plan)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autoround_leaves_the_rest_of_the_model_as_it_was(case, dtype):
    """The library computes in a dtype that it chooses by the device, and casts the whole model to it."""
    available("autoround")
    one = case("idefics3")
    model = copy.deepcopy(one.model).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work = Quantization(model, get("autoround", iters=1), QuantPlan(language=QuantSpec(4, GROUP)))
    work.finish(one.batches, processor=one.processor)
    after = model.state_dict()
    same = before.keys() & after.keys()
    assert len(same) > 20
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in same)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.dense_rows(0, 1).dtype for layer in layers} == {dtype}


@pytest.mark.parametrize("component", ["connector", "head"])
def test_autoround_refuses_what_lies_outside_of_blocks(component):
    with pytest.raises(ValueError, match=f"tunes blocks of decoder and vision tower; {component} lies outside"):
        get("autoround").check(QuantPlan(language=QuantSpec(4), **{component: QuantSpec(4)}))


def test_autoround_refuses_eight_bits_with_zero_points():
    with pytest.raises(ValueError, match="8-bit weights are symmetric; set symmetric=True"):
        get("autoround").check(QuantPlan(language=QuantSpec(8)))
