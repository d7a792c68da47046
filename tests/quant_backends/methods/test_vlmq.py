"""GPTQ and AWQ with weighted tokens: textbook codes, gradients of a full backward pass, and MBQ's weighting within."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.gradients import measure_token_weights, weigh_modalities
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.methods.scale_search import candidates
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.quantization import quantize
from lmms_plugin.quant_backends.statistics import ROLES, TOKEN_ROLES, InputStatistics, Sensitivity, held_back_rows

ROWS, COLUMNS = 16, 64
IMAGE, TEXT, ANSWER = range(3)


def linear(seed=1):
    torch.manual_seed(seed)
    return nn.Linear(COLUMNS, ROWS, bias=False)


def inputs(rows, seed, mixing):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(COLUMNS // 4, COLUMNS, generator=torch.Generator().manual_seed(mixing))
    return torch.randn(rows, COLUMNS // 4, generator=generator) @ basis + 0.3 * torch.randn(
        rows, COLUMNS, generator=generator
    )


def gathered(x, weights, **kept):
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True, **kept)
    for index, (part, weight) in enumerate(zip(x.chunk(8), weights.chunk(8), strict=True)):
        entry.add(part, held_back=held_back_rows(index, 8), weights=weight)
    return entry


def textbook(weight, spec, hessian, damping=0.01):
    """GPTQ with any Hessian (equations 2 and 3 of the paper), in float64, in the columns' own order."""
    nearest = round_by_blocks(weight, spec)
    size, zero = nearest.codes.shape[-1], nearest.zero_point
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    inverse, moved = torch.linalg.inv(hessian), weight.double().clone()
    stored = torch.empty_like(moved)
    for column in range(COLUMNS):
        scale, offset = nearest.scale[:, column // size].double(), zero[:, column // size].double()
        code = (moved[:, column] / scale).round().add(offset).clamp(0, (1 << spec.bits) - 1)
        stored[:, column] = (code - offset) * scale
        error = (moved[:, column] - stored[:, column]) / inverse[column, column]
        moved -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return stored.float()


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_the_textbook_with_a_weighted_hessian(bits):
    layer, x, spec = linear(), inputs(500, 0, 7), QuantSpec(bits, 32)
    weights = torch.rand(500, generator=torch.Generator().manual_seed(2)) ** 4
    hessian = (x.double() * weights.double().unsqueeze(1)).T @ x.double()
    # Without rows held back every row that is better on the inputs it was fitted to keeps its correction.
    (found,) = get("vlmq", act_order=False, damping=0.01).solve([layer], [spec], gathered(x, weights))
    expected = textbook(layer.weight, spec, hessian)
    rows = (found.layer.weight != round_by_blocks(layer.weight, spec).dequantize(bits, torch.float32)).any(1)
    assert rows.sum() > ROWS / 2
    agree = torch.isclose(found.layer.weight[rows], expected[rows], atol=1e-5).float().mean()
    assert agree > 0.995, "up to ties that float32 and float64 see differently"
    unweighted = textbook(layer.weight, spec, x.double().T @ x.double())
    assert not torch.isclose(unweighted, expected, atol=1e-5).all(), "the weights make a difference"


@torch.no_grad()
def test_equal_weights_are_gptq_and_so_are_none():
    layer, x, spec = linear(), inputs(500, 0, 7), QuantSpec(3, 32)
    (gptq,) = get("gptq").solve([layer], [spec], gathered(x, torch.ones(500), holds_back=True))
    (equal,) = get("vlmq").solve([layer], [spec], gathered(x, torch.full((500,), 4.0), holds_back=True))
    assert torch.equal(equal.layer.weight, gptq.layer.weight)
    assert (equal.method, equal.plain_rows) == (None, gptq.plain_rows)
    nothing = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True, holds_back=True)
    for index, part in enumerate(x.chunk(8)):
        nothing.add(part, held_back=held_back_rows(index, 8))
    (without,) = get("vlmq").solve([layer], [spec], nothing)
    assert torch.equal(without.layer.weight, gptq.layer.weight)
    assert without.method == "vlmq, unweighted"


@torch.no_grad()
def test_redundant_image_tokens_do_not_drown_the_answer():
    layer, spec = linear(), QuantSpec(3, 32)
    image, answer = inputs(3000, 0, 7), inputs(300, 1, 8)
    mixed = torch.cat([torch.cat(pair) for pair in zip(image.chunk(8), answer.chunk(8), strict=True)])
    weights = torch.cat(
        [
            torch.cat([torch.full((len(a),), 0.01), torch.ones(len(b))])
            for a, b in zip(image.chunk(8), answer.chunk(8), strict=True)
        ]
    )
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True, holds_back=True)
    sizes = [len(a) + len(b) for a, b in zip(image.chunk(8), answer.chunk(8), strict=True)]
    for index, (part, weight) in enumerate(zip(mixed.split(sizes), weights.split(sizes), strict=True)):
        entry.add(part, held_back=held_back_rows(index, 8), weights=weight)
    unseen = inputs(1000, 5, 8)
    errors = {
        method: float((unseen @ (get(method).solve([layer], [spec], entry)[0].layer.weight - layer.weight).T).norm())
        for method in ("gptq", "vlmq")
    }
    assert errors["vlmq"] < 0.9 * errors["gptq"]


@torch.no_grad()
def test_mbqs_weighting_is_a_special_case():
    """The Hessian with weights of modalities is the matrix that MBQ's squared loss compares scales by."""
    x = inputs(90, 0, 7)
    roles = [torch.tensor([IMAGE] * 20 + [TEXT] * 5 + [ANSWER] * 5)] * 3
    sensitivity = Sensitivity(image=0.2, answer=1.0, ratio=0.2)
    weights = weigh_modalities({"layer": sensitivity}, roles)["layer"]
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True, by_role=True)
    for part, role, weight in zip(x.chunk(3), roles, weights, strict=True):
        entry.add(part, role, weights=weight)
    entry.sensitivity = sensitivity
    torch.testing.assert_close(entry.weighted.gram, get("mbq", loss="mse").objective(entry).gram)


def same(one, other):
    return all(torch.equal(one.layer.state_dict()[key], value) for key, value in other.layer.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True], ids=["scales", "scales and clipping"])
def test_awq_with_equal_weights_is_awq_and_so_is_awq_with_none(clip):
    layer, x, spec = linear(), inputs(500, 0, 7), QuantSpec(3, 32)
    (plain,) = get("awq", clip=clip).solve([layer], [spec], gathered(x, torch.ones(500)))
    weighted = get("awq", clip=clip, token_weights="gradient")
    (equal,) = weighted.solve([layer], [spec], gathered(x, torch.full((500,), 4.0)))
    assert same(equal, plain)
    assert (plain.method, equal.method) == (None, None)
    nothing = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True)
    for part in x.chunk(8):
        nothing.add(part)
    (without,) = weighted.solve([layer], [spec], nothing)
    assert same(without, plain)
    assert without.method == "awq, unweighted"


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_awq_with_weights_finds_the_scale_of_a_loop_over_weighted_tokens(seed):
    x = inputs(300, seed, 7) * torch.linspace(-2, 2, COLUMNS).exp()
    layer, spec, weights = linear(), QuantSpec(3, 32), torch.rand(300, generator=torch.Generator().manual_seed(seed))
    weights = weights**8
    entry = gathered(x, weights)
    losses = []
    for inverse in candidates(entry.mean_magnitude, torch.float32):
        rounded = round_by_blocks(layer.weight / inverse, spec).dequantize(3, torch.float32) * inverse
        losses.append(float(weights.double() @ (x.double() @ (rounded - layer.weight).double().T).square().sum(1)))
    (found,) = get("awq", token_weights="gradient").solve([layer], [spec], entry)
    best = candidates(entry.mean_magnitude, torch.float32)[losses.index(min(losses))]
    assert torch.equal(found.layer.in_scale, best)


@torch.no_grad()
def test_awq_with_weights_of_modalities_is_mbq_with_its_squared_loss():
    layer, spec, x = linear(), QuantSpec(3, 32), inputs(90, 0, 7) * torch.linspace(-1, 1, COLUMNS).exp()
    roles = [torch.tensor([IMAGE] * 20 + [TEXT] * 5 + [ANSWER] * 5)] * 3
    sensitivity = Sensitivity(image=0.2, answer=1.0, ratio=0.2)
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True, by_role=True)
    shares = weigh_modalities({"layer": sensitivity}, roles)["layer"]
    for part, role, weight in zip(x.chunk(3), roles, shares, strict=True):
        entry.add(part, role, weights=weight)
    entry.sensitivity = sensitivity
    (mbq,) = get("mbq", loss="mse").solve([layer], [spec], entry)
    (awq,) = get("awq", token_weights="modality").solve([layer], [spec], entry)
    assert same(awq, mbq)


def loaded(checkpoint, family, count):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family)).eval()
    processor, spec = AutoProcessor.from_pretrained(checkpoint(family)), CalibrationSpec("noise", samples=count)
    samples, dialect = spec.load_samples(), dialect_for(model.config.model_type)
    batches, _ = build_batches(model, processor, spec, samples, dialect, keep_logits=False, by_role=True)
    return model, batches


def gradients(model, layer, batch):
    """Return mean |gradient| at each position of a layer's output, by a full backward pass through everything."""
    kept = []

    def keep(_, __, output):
        output.retain_grad()
        kept.append(output)

    hook = model.get_submodule(layer).register_forward_hook(keep)
    start = int((batch[TOKEN_ROLES] == ROLES.index("answer")).nonzero()[0])
    inputs_of = {key: value for key, value in batch.items() if key not in (TOKEN_ROLES, "logits_to_keep")}
    logits = model(**inputs_of).logits[0, start - 1 : -1]
    nn.functional.cross_entropy(logits.float(), batch["input_ids"][0, start:]).backward()
    hook.remove()
    return kept[0].grad.abs().mean(-1).reshape(-1)


@pytest.mark.model
@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_weights_are_those_of_a_full_backward_pass(checkpoint, family):
    model, batches = loaded(checkpoint, family, 2)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("layers.0.mlp.down_proj")]
    layers = [name for name in layers if "vis" not in name]
    found = measure_token_weights(model, layers, batches)
    raw = [gradients(model, layers[0], batch) for batch in batches]
    mean = torch.cat(raw).mean()
    for one, expected in zip(found[layers[0]], raw, strict=True):
        torch.testing.assert_close(one, expected / mean, rtol=1e-3, atol=1e-5)


@pytest.mark.model
@pytest.mark.parametrize("method", ["vlmq", "awq"])
def test_through_the_whole_model(checkpoint, method):
    _, batches = loaded(checkpoint, "qwen2_5_vl", 4)
    for source in ("gradient", "modality"):
        twin = AutoModelForImageTextToText.from_pretrained(checkpoint("qwen2_5_vl")).eval()
        plan = QuantPlan(language=QuantSpec(4, 32), vision=QuantSpec(8, 32))
        work = quantize(twin, get(method, token_weights=source), plan, batches)
        reports = [report for report in work.modules() if report.reason is None]
        methods = {part: {r.method for r in reports if r.component == part} for part in ("language", "vision")}
        assert methods == {"language": {method}, "vision": {f"{method}, unweighted"}}


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="vlmq: token_weights must be gradient or modality, got 'attention'"):
        get("vlmq", token_weights="attention")
    with pytest.raises(ValueError, match="awq: token_weights must be gradient or modality, got 'attention'"):
        get("awq", token_weights="attention")
    with pytest.raises(ValueError, match="vlmq: damping must be a number from 0 to 10, got -1"):
        get("vlmq", damping=-1)


def test_as_many_weights_as_rows():
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), weighted=True)
    with pytest.raises(ValueError, match="layer was fed 3 rows, but the weights of 2 are given"):
        entry.add(torch.zeros(3, COLUMNS), weights=torch.ones(2))
