"""Methods that take `format=` and `activation_format=`: against plain arithmetic, and what they refuse."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from lmms_plugin.arguments import ModelArguments, expect_effect
from lmms_plugin.quant_backends import get, option_types
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.formats.codec import effective_scale, fake_quantize, spread
from lmms_plugin.quant_backends.formats.entries import FORMATS
from lmms_plugin.quant_backends.layers.format_linear import FormatLinear
from lmms_plugin.quant_backends.methods.scale_search import candidates
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

FLOATS = ("fp8_e4m3", "fp8_e4m3_tensor", "fp8_e4m3_block", "mxfp6_e2m3", "mxfp4", "nvfp4", "nf4")
METHODS = ("rtn", "gptq", "awq", "mbq")
COLUMNS = 160


def layer(rows=144, seed=0):
    found = nn.Linear(COLUMNS, rows)
    found.weight.data = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return found


def inputs(rows=1500):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, COLUMNS // 4, generator=generator) @ torch.randn(COLUMNS // 4, COLUMNS, generator=generator)
    x += torch.randn(rows, COLUMNS, generator=generator)
    x[:, ::10] *= 8
    return x


def statistics(x, **kept):
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), **kept)
    entry.add(x, held_back=slice(3, None, 4))
    return entry


def spec_of(name):
    return QuantSpec(FORMATS[name].bits)


def error(found, linear, x):
    return float((x @ (found.weight - linear.weight).T).norm() / (x @ linear.weight.T).norm())


@torch.no_grad()
@pytest.mark.parametrize("name", FLOATS)
def test_rtn_is_the_codec(name):
    linear = layer()
    found = get("rtn", format=name).quantize_linear(linear.weight, linear.bias, spec_of(name))
    assert torch.equal(found.weight, fake_quantize(linear.weight, FORMATS[name]))


@torch.no_grad()
@pytest.mark.parametrize("name", FLOATS)
def test_gptq_corrects_each_column_for_the_errors_before_it(name):
    """The columns' own recursion, written down with an inverse Hessian as in the paper (no act-order)."""
    linear, x, form = layer(24), inputs(), FORMATS[name]
    # Without rows held back every correction is judged by the inputs it was fitted to.
    entry = statistics(x)
    (found,) = get("gptq", format=name, act_order=False, damping=0.01).solve([linear], [spec_of(name)], entry)
    stored = found.layer.quantized
    grid = spread(effective_scale(stored.scale, stored.global_scale, form), linear.weight, form).expand(24, COLUMNS)
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work, expected = linear.weight.double().clone(), torch.zeros(24, COLUMNS)
    one = replace(FORMATS["fp8_e4m3_tensor"], element=form.element)
    for column in range(COLUMNS):
        steps = (work[:, column].float() / grid[:, column]).unsqueeze(1)
        expected[:, column] = fake_quantize(steps, one, scale=torch.ones(1, 1))[:, 0] * grid[:, column]
        missed = (work[:, column] - expected[:, column].double()) / upper[column, column]
        work[:, column:] -= missed.unsqueeze(1) * upper[column, column:].unsqueeze(0)
    plain = fake_quantize(linear.weight, form)
    rows = (found.layer.weight != plain).any(1)
    assert rows.sum() >= 20
    agree = (found.layer.weight[rows] == expected[rows]).float().mean()
    assert agree > 0.99, "up to ties that float32 and float64 see differently"


@torch.no_grad()
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("method", ["gptq", "awq", "mbq"])
def test_calibrated_methods_are_better_than_rounding(method, name):
    linear, x = layer(), inputs()
    entry = statistics(x, by_role=method == "mbq", holds_back=method == "gptq")
    (found,) = get(method, format=name).solve([linear], [spec_of(name)], entry)
    rounded = get("rtn", format=name).quantize_linear(linear.weight, linear.bias, spec_of(name))
    assert isinstance(found.layer, FormatLinear)
    assert found.layer.format == FORMATS[name]
    assert error(found.layer, linear, x) < error(rounded, linear, x) * (0.9 if method == "gptq" else 1.0001)


@torch.no_grad()
@pytest.mark.parametrize("name", FLOATS)
def test_awq_takes_the_scale_with_the_least_error(name):
    """Exhaustive: the layer's error for every exponent of the grid, one after another."""
    linear, x = layer(), inputs()
    entry = statistics(x)
    (found,) = get("awq", format=name).solve([linear], [spec_of(name)], entry)
    inverses = candidates(entry.mean_magnitude, torch.float32)
    errors = [
        float((x @ (fake_quantize(linear.weight / inverse, FORMATS[name]) * inverse - linear.weight).T).square().sum())
        for inverse in inverses
    ]
    best = errors.index(min(errors))
    assert torch.equal(found.layer.in_scale, inverses[best])
    assert torch.equal(
        found.layer.weight, fake_quantize(linear.weight / inverses[best], FORMATS[name]) * inverses[best]
    )


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_an_integer_format_is_the_same_as_its_bits(method):
    linear, x = layer(), inputs()
    for name, symmetric in (("int4", True), ("int4_asym", False)):
        pair = []
        for options, spec in (({"format": name}, QuantSpec(4, 32)), ({}, QuantSpec(4, 32, symmetric))):
            backend = get(method, **options)
            if method == "rtn":
                pair.append(backend.quantize_linear(linear.weight, linear.bias, spec))
            else:
                entry = statistics(x, by_role=method == "mbq", holds_back=method == "gptq")
                pair.append(backend.solve([linear], [spec], entry)[0].layer)
        assert type(pair[0]) is type(pair[1])
        assert torch.equal(pair[0].weight, pair[1].weight)
        assert pair[0].spec == pair[1].spec


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "awq", "mbq"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "nvfp4", "int8"])
def test_static_scales_come_from_the_inputs_as_the_layer_sees_them(method, name):
    linear, x = layer(), inputs()
    entry = statistics(x, by_role=method == "mbq", holds_back=method == "gptq")
    given = {} if name == "nvfp4" else {"activation_granularity": "tensor"}
    backend = get(method, format="fp8_e4m3", activation_format=name, **given)
    found = backend.solve([linear], [spec_of("fp8_e4m3")], entry)[0].layer
    seen = x if found.in_scale is None else x * found.in_scale
    assert found.static_scale == found.rounding.static_scale(seen.abs().amax())
    plain = get(method, format="fp8_e4m3")
    with pytest.raises(ValueError, match="that no calibration input reached has no static scale"):
        backend.without_inputs(linear, spec_of("fp8_e4m3"))
    assert plain.without_inputs(linear, spec_of("fp8_e4m3")).rounding is None


def test_act_bits_is_int8_per_token():
    for method in ("rtn", "mbq"):
        old, new = get(method, act_bits=8), get(method, activation_format="int8")
        assert old.rounding == new.rounding
    linear = layer()
    pair = [
        get("rtn", **options).quantize_linear(linear.weight, linear.bias, QuantSpec(8, None, True))
        for options in ({"act_bits": 8}, {"activation_format": "int8"})
    ]
    assert type(pair[0]) is type(pair[1])
    with torch.no_grad():
        assert torch.equal(pair[0](inputs(4)), pair[1](inputs(4)))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rtn", {"format": "nvfp5"}, "unknown format 'nvfp5'"),
        ("awq", {"format": "mxfp4", "clip": True}, "clip=True narrows the ranges of groups of integers"),
        ("awq", {"format": "fp8_e4m3_block", "fold": True}, "format=fp8_e4m3_block has scales over several rows"),
        ("rtn", {"activation_granularity": "token"}, "activation_granularity=token needs an activation_format"),
        ("rtn", {"activation_format": "int8", "activation_granularity": "tensor"}, "takes a static scale"),
        ("rtn", {"act_bits": 8, "activation_format": "fp8_e4m3"}, "act_bits=8 is activation_format=int8, but"),
        ("hqq", {"format": "nvfp4"}, "unknown option 'format'"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_anything_is_read(method, options, message):
    with pytest.raises(ValueError, match=message):
        get(method, **options)


@pytest.mark.parametrize(
    ("method", "options", "spec", "message"),
    [
        ("rtn", {}, {"format": "nvfp4"}, "format=nvfp4 has 4 bits per weight, but 8 were asked for"),
        ("rtn", {}, {"activation_format": "nvfp5"}, "unknown format 'nvfp5'"),
        ("rtn", {"rotation": "hadamard"}, {"activation_format": "int8"}, "leave activation_format out of the plan"),
        ("smoothquant", {}, {"activation_format": "none"}, "smoothquant: expected an activation_format, got None"),
        ("hqq", {}, {"format": "int8"}, "hqq takes no formats, but the plan asks for int8; rtn, gptq and awq do"),
    ],
)
def test_formats_of_a_plan_that_a_method_cannot_do_are_refused(method, options, spec, message):
    with pytest.raises(ValueError, match=message):
        get(method, **options).check(QuantPlan(language=QuantSpec(8, **spec)))


def test_a_spec_changes_the_formats_that_it_names_alone():
    backend = get("gptq", format="nvfp4", activation_format="fp8_e4m3", activation_granularity="tensor", damping=0.1)
    assert backend.for_spec(QuantSpec(4)) is backend
    other = backend.for_spec(QuantSpec(8, format="fp8_e4m3"))
    assert other == get("gptq", **(vars_of(backend) | {"format": "fp8_e4m3"}))
    plain = backend.for_spec(QuantSpec(4, activation_format="none"))
    assert (plain.stored.name, plain.rounding, plain.damping) == ("nvfp4", None, 0.1)
    assert get("rtn", act_bits=8).for_spec(QuantSpec(8, activation_format="none")).rounding is None


def vars_of(backend):
    return {one.name: getattr(backend, one.name) for one in fields(backend)}


def test_bits_come_from_the_format_and_others_are_refused():
    for given, message in (
        ({"bits": 4}, "format=fp8_e4m3 has 8 bits per weight, but 4 were asked for"),
        ({"vision_bits": 4}, "but 4 were asked for"),
        ({"group_size": 64}, "format=fp8_e4m3 scales blocks of 1 x all: leave out group_size"),
        ({"symmetric": True}, "format=fp8_e4m3 is symmetric: leave out symmetric"),
        ({"vision_bits": 8, "connector_bits": 16}, None),
    ):
        arguments = ModelArguments.parse({"format": "fp8_e4m3", **given}, option_types("rtn"))
        backend = get("rtn", **arguments.options)
        plan = arguments.quant_plan(backend.default_bits)
        assert plan.language.bits == given.get("bits", 8)

        def check(backend=backend, given=given, plan=plan):
            expect_effect(given, backend)
            backend.check(plan)

        if message is None:
            check()
            continue
        with pytest.raises(ValueError, match=message):
            check()


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("nvfp4", "components: {language: {group_size: 64}}", "leave out group_size in the plan file"),
        ("nvfp4", "rules: [{match: up_proj, group_size: 16}]", "format=nvfp4 scales blocks of 1 x 16: leave out"),
        ("int4", "components: {language: {symmetric: false}}", "format=int4 is symmetric: leave out symmetric in the"),
        ("int4", "components: {language: {group_size: 64}}", None),
        ("nvfp4", "components: {vision: 4}", None),
    ],
)
def test_so_is_what_a_plan_file_says_otherwise(tmp_path, form, text, message):
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    given = {"format": form, "plan": str(plan)}
    if message is None:
        expect_effect(given, get("rtn", format=form))
        return
    with pytest.raises(ValueError, match=message):
        expect_effect(given, get("rtn", format=form))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_quantizes_a_model(checkpoint, method):
    loaded = load_quantized(
        str(checkpoint("qwen2_5_vl")),
        backend=get(method, format="nvfp4", activation_format="nvfp4"),
        plan=QuantPlan.from_arguments(bits=4, vision_bits=4),
        calibration=None if method == "rtn" else CalibrationSpec("noise", samples=2),
        dtype=torch.float32,
    )
    quantized = loaded.report.quantized
    assert {module.bits for module in quantized} == {4}
    assert all(module.kernel.startswith("nvfp4, dequantize, nvfp4 inputs, ") for module in quantized)
    form = FORMATS["nvfp4"]
    for module in quantized:
        rows, columns = module.shape
        kept = {"rtn": 0, "gptq": 4}.get(method, 4 + 4 * columns) * 8 / (rows * columns)
        assert 8 * module.bytes_after / (rows * columns) == pytest.approx(
            form.bits_per_weight(rows, columns) + kept, abs=8 / columns
        )
