"""MBQ: gradients as a plain backward pass gives them, modalities weighed by them, AWQ where they weigh the same."""

import copy
import statistics as stdlib

import pytest
import torch
import torch.nn.functional as functional
from helpers.families import FAMILIES
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends.calibration.gradients import measure_sensitivities
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.memory import Residence
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.methods.awq import AwqBackend
from lmms_plugin.quant_backends.methods.mbq import MbqBackend
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.methods.scale_search import EXPONENTS
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import ROLES, SAMPLE_ROWS, TOKEN_ROLES, InputStatistics, Sensitivity
from lmms_plugin.quant_backends.structure.blocks import find_blocks

IMAGE, TEXT, ANSWER = range(3)
COLUMNS = 32
NAMES = ("layers.0.mlp.up_proj", "layers.0.mlp.gate_proj")
EXITS = ("self_attn.o_proj", "mlp.down_proj")


def load(path, samples=2):
    """Return a tiny model and calibration samples of random images and words."""
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    spec = CalibrationSpec("noise", samples)
    dialect = dialect_for(model.config.model_type)
    drawn = [sample._replace(image=sample.image.resize((64, 48))) for sample in spec.load_samples()]
    batches, _ = build_batches(model, processor, spec, drawn, dialect, keep_logits=False, by_role=True)
    return model, batches


def decoder_layers(model):
    language = next(name for name, module in model.named_modules() if module is model.get_decoder())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{language}.layers.")
    ]


def straightforward(model, batches, names):
    """Return mean |gradient| per named module, by a full backward pass through everything, parameters included."""
    totals = {name: [0.0, 0.0] for name in names}
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in (TOKEN_ROLES, "logits_to_keep")}
        roles, kept = batch[TOKEN_ROLES], {}

        def keep(module, _, output, kept=kept):
            output.retain_grad()
            kept[module] = output

        handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
        model.requires_grad_(True)
        logits = model(**inputs).logits[0]
        answer = roles == ANSWER
        places = answer.nonzero().flatten()
        functional.cross_entropy(logits[places - 1], inputs["input_ids"][0, places]).backward()
        for handle in handles:
            handle.remove()
        for name in names:
            gradient = kept[model.get_submodule(name)].grad[0].abs()
            totals[name][0] += float(gradient[roles == IMAGE].mean()) / len(batches)
            totals[name][1] += float(gradient[answer].mean()) / len(batches)
        model.zero_grad()
    return totals


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_full_backward_pass(checkpoint, family):
    model, batches = load(checkpoint(family))
    layers = decoder_layers(model)
    found = measure_sensitivities(model, layers, batches)
    assert set(found) == set(layers)
    exits = [name for name in layers if name.endswith(EXITS)]
    expected = straightforward(model, batches, exits)
    for kind in EXITS:
        members = [name for name in exits if name.endswith(kind)]
        median = stdlib.median(expected[name][0] / expected[name][1] for name in members)
        for name in members:
            image, answer = expected[name]
            assert found[name][:2] == pytest.approx((image, answer), rel=1e-3)
            assert found[name].ratio == pytest.approx(max(image / answer, median), rel=1e-3)
            inside = [layer for layer in layers if layer.startswith(name.rpartition(".")[0] + ".")]
            assert len(inside) > 1
            assert all(found[layer] == found[name] for layer in inside)


def test_measuring_leaves_no_trace(checkpoint):
    model, batches = load(checkpoint("qwen2_5_vl"), samples=1)
    model.lm_head.weight.requires_grad_(False)
    before = {name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        measure_sensitivities(model, decoder_layers(model), batches)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks


def test_the_inside_of_a_block_is_not_kept_until_the_backward_pass(checkpoint):
    """Every block's forward runs once more on the way back: nothing within it had been kept."""
    model, batches = load(checkpoint("qwen2_5_vl"), samples=1)
    calls = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if name.endswith(("mlp.gate_proj", "lm_head")) and "visual" not in name
    ]
    measure_sensitivities(model, decoder_layers(model), batches)
    for handle in handles:
        handle.remove()
    gates = [name for name in calls if "gate_proj" in name]
    assert gates == [*dict.fromkeys(gates), *reversed(dict.fromkeys(gates))]
    assert calls.count("lm_head") == 1


class Elsewhere(Residence):
    """Keeps blocks where they cannot be used: between their turns their weights are NaN."""

    def __init__(self):
        super().__init__()
        self.turns = []
        self._home = {}

    def settle(self, model, names):
        super().settle(model, names)
        for name in self.blocks:
            parameters = list(model.get_submodule(name).parameters())
            self._home[name] = [(parameter, parameter.data) for parameter in parameters]
            self.leave(name)

    def enter(self, name):
        self.turns.append(name)
        for parameter, data in self._home[name]:
            parameter.data = data

    def leave(self, name):
        for parameter, data in self._home[name]:
            parameter.data = torch.full_like(data, float("nan"))


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_blocks_need_be_on_the_device_for_their_turns_only(checkpoint, family):
    model, batches = load(checkpoint(family), samples=1)
    layers = decoder_layers(model)
    expected = measure_sensitivities(model, layers, batches)
    residence = Elsewhere()
    residence.settle(model, find_blocks(model, layers))
    assert measure_sensitivities(model, layers, batches, residence) == expected
    decoder = [name for name in residence.turns if any(layer.startswith(f"{name}.") for layer in layers)]
    forth = list(dict.fromkeys(decoder))
    assert decoder == [*forth, *forth[-2::-1]]
    assert all(parameter.isnan().all() for name in forth for parameter in model.get_submodule(name).parameters())


def test_positions_on_several_axes_count(checkpoint):
    """The samples go through the model's own forward: with positions along one axis the gradients are others."""
    model, batches = load(checkpoint("qwen2_5_vl"), samples=1)
    layers = decoder_layers(model)
    own = measure_sensitivities(model, layers, batches)
    flat = torch.arange(batches[0]["input_ids"].shape[1]).expand(3, 1, -1)
    other = measure_sensitivities(model, layers, [batches[0] | {"position_ids": flat}])
    assert own[layers[0]].image != pytest.approx(other[layers[0]].image, rel=1e-3)


def test_half_precision_gives_the_same_ratios(checkpoint):
    model, batches = load(checkpoint("llava"), samples=1)
    layers = decoder_layers(model)
    whole = measure_sensitivities(model, layers, batches)
    cast = [batch | {"pixel_values": batch["pixel_values"].half()} for batch in batches]
    half = measure_sensitivities(model.half(), layers, cast)
    assert half[layers[0]].ratio == pytest.approx(whole[layers[0]].ratio, rel=0.05)


def test_gradients_that_are_not_finite_are_an_error(checkpoint):
    model, batches = load(checkpoint("llava"), samples=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss of a calibration answer is nan"):
        measure_sensitivities(model, decoder_layers(model), batches)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_that_reach_nothing_are_an_error(checkpoint):
    model, batches = load(checkpoint("llava"), samples=1)
    layers = decoder_layers(model)
    first = model.get_submodule(layers[0].partition(".self_attn")[0])
    last = model.get_submodule(layers[-1].partition(".mlp")[0])
    first.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    last.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    with pytest.raises(ValueError, match=r"no gradient of the answers' loss reaches any of 4 parts, like .*layers\.0"):
        measure_sensitivities(model, layers, batches)


def test_a_part_that_never_runs_has_no_sensitivity(checkpoint):
    model, batches = load(checkpoint("llava"), samples=1)
    expected = measure_sensitivities(model, decoder_layers(model), batches)
    block = decoder_layers(model)[0].partition(".self_attn")[0]
    model.get_submodule(block).spare = nn.Linear(64, 64)
    layers = decoder_layers(model)
    assert f"{block}.spare" in layers
    assert measure_sensitivities(model, layers, batches) == expected


def rows(count, seed, outliers=()):
    x = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed))
    x[:, list(outliers)] *= 20
    return x


def gathered(image, answer, text=None, ratio=1.0, names=NAMES):
    """Return statistics of rows of each role, image first."""
    parts = [image, answer] if text is None else [image, text, answer]
    roles = [torch.full((len(part),), role) for part, role in zip(parts, (IMAGE, ANSWER), strict=False)]
    if text is not None:
        roles = [torch.full((len(part),), role) for part, role in zip(parts, (IMAGE, TEXT, ANSWER), strict=True)]
    entry = InputStatistics.empty(names, COLUMNS, torch.device("cpu"), by_role=True)
    entry.add(torch.cat(parts), torch.cat(roles))
    entry.sensitivity = None if ratio is None else Sensitivity(ratio, 1.0, ratio)
    return entry


def layers_of(count=2, seed=3):
    torch.manual_seed(seed)
    return [nn.Linear(COLUMNS, 24) for _ in range(count)]


def same(one, other):
    return all(
        torch.equal(value, b.layer.state_dict()[key])
        for a, b in zip(one, other, strict=True)
        for key, value in a.layer.state_dict().items()
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_awq_where_both_modalities_weigh_the_same(bits, seed):
    entry = gathered(rows(40, seed, (3,)), rows(40, seed + 10, (8, 9)))
    layers, specs = layers_of(), [QuantSpec(bits, 16)] * 2
    balanced = MbqBackend(loss="mse").solve(layers, specs, entry)
    plain = AwqBackend().solve(layers, specs, entry)
    assert same(balanced, plain)


def test_it_is_awq_where_modalities_cannot_be_told_apart():
    layers, specs = layers_of(), [QuantSpec(3, 16)] * 2
    vision = InputStatistics.empty(NAMES, COLUMNS, torch.device("cpu"), by_role=True)
    vision.add(rows(50, 0, (3,)))
    unknown = gathered(rows(40, 0, (3,)), rows(9, 1), ratio=None)
    for entry in (vision, unknown):
        found = MbqBackend(loss="mse").solve(layers, specs, entry)
        assert same(found, AwqBackend().solve(layers, specs, entry))
        assert {solution.method for solution in found} == {"mbq, unbalanced"}
    (told, _) = MbqBackend(loss="mse").solve(layers, specs, gathered(rows(40, 0, (3,)), rows(9, 1)))
    assert told.method is None


def authors_search(weights, spec, image, answer, text, ratio, loss):
    """Return the exponent by the authors' loop with their two losses, one candidate and one weight at a time."""
    everything = torch.cat([image, text, answer])
    magnitude = everything.abs().mean(0)
    losses = []
    for exponent in EXPONENTS:
        scale = magnitude.pow(exponent).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        total = 0.0
        for weight in weights:
            kept = round_to_nearest(weight * scale, spec, torch.float32).dequantize(spec.bits, torch.float32) / scale
            change_image, change_answer = image @ (kept - weight).T, answer @ (kept - weight).T
            if loss == "mae":
                total += float(change_answer.abs().sum() + ratio * change_image.abs().sum()) / (
                    len(image) + len(answer)
                )
            else:
                total += float(change_answer.square().sum(1).mean() + ratio * change_image.square().sum(1).mean())
        losses.append(total)
    return EXPONENTS[losses.index(min(losses))], losses


@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_the_one_that_the_authors_loop_finds(loss, ratio, seed):
    image, answer, text = rows(90, seed, (1, 2)), rows(12, seed + 10, (20,)), rows(30, seed + 20)
    entry = gathered(image, answer, text, ratio)
    layers, spec = layers_of(seed=seed), QuantSpec(3, 16)
    exponent, _ = authors_search([layer.weight.detach() for layer in layers], spec, image, answer, text, ratio, loss)
    found = MbqBackend(loss=loss).solve(layers, [spec] * 2, entry)
    magnitude = torch.cat([image, text, answer]).abs().mean(0)
    scale = magnitude.pow(exponent).clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    for solution in found:
        torch.testing.assert_close(solution.layer.in_scale, 1 / scale)


@pytest.mark.parametrize("loss", ["mae", "mse"])
def test_the_objective_is_the_weighted_error_of_both_modalities(loss):
    image, answer, text = rows(30, 0), rows(10, 1), rows(20, 2)
    weight = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(4))
    change = torch.randn(2, 8, COLUMNS, generator=torch.Generator().manual_seed(5))

    def measured(image, ratio):
        errors = MbqBackend(loss=loss).objective(gathered(image, answer, text, ratio)).errors_of(torch.ones(2, COLUMNS))
        return errors(weight + change, weight).sum(1)

    one, three = measured(image, 1.0), measured(image, 3.0)
    power = 1 if loss == "mae" else 2
    of_image = (image @ change.transpose(1, 2)).abs().pow(power).sum((1, 2)).double()
    of_answer = (answer @ change.transpose(1, 2)).abs().pow(power).sum((1, 2)).double()
    if loss == "mse":
        of_image, of_answer = of_image / len(image), of_answer / len(answer)
    torch.testing.assert_close(one, of_image + of_answer, rtol=1e-5, atol=0)
    torch.testing.assert_close(three, 3 * of_image + of_answer, rtol=1e-5, atol=0)
    # Twice as many image tokens of the same kind count twice in mae alone.
    twice = measured(torch.cat([image, image]), 1.0)
    torch.testing.assert_close(twice, (2 if loss == "mae" else 1) * of_image + of_answer, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("loss", ["mae", "mse"])
def test_the_modality_that_weighs_more_keeps_its_outputs_better(loss):
    image, answer = rows(60, 0, (1, 2)), rows(60, 1, (20, 21))
    layers, specs = layers_of(1, seed=1), [QuantSpec(2, COLUMNS)]
    power = 1 if loss == "mae" else 2

    def error(x, ratio):
        (solution,) = MbqBackend(loss=loss).solve(layers, specs, gathered(image, answer, ratio=ratio, names=NAMES[:1]))
        return float((solution.layer(x) - layers[0](x)).abs().pow(power).sum())

    assert error(image, 100.0) <= error(image, 0.01)
    assert error(answer, 0.01) <= error(answer, 100.0)
    assert (error(image, 100.0), error(answer, 100.0)) != (error(image, 0.01), error(answer, 0.01))


@torch.no_grad()
def test_absolute_errors_over_more_tokens_than_are_kept_come_from_a_fair_sample():
    """The sampled sum stands for all rows: unbiased, with a relative deviation of about 1 / √SAMPLE_ROWS."""
    image, answer = rows(6 * SAMPLE_ROWS, 0), rows(2 * SAMPLE_ROWS, 1) * 2
    entry = gathered(image, answer, ratio=0.5)
    change = torch.randn(1, 8, COLUMNS, generator=torch.Generator().manual_seed(5))
    found = MbqBackend().objective(entry).errors_of(torch.ones(1, COLUMNS))(change.clone(), torch.zeros(8, COLUMNS))
    exact = 0.5 * (image @ change[0].T).abs().sum() + (answer @ change[0].T).abs().sum()
    assert float(found.sum()) == pytest.approx(float(exact), rel=5 / SAMPLE_ROWS**0.5)


@torch.no_grad()
def test_the_objective_is_never_above_that_of_rounding():
    for seed in range(5):
        image, answer = rows(60, seed, (1, 2)), rows(30, seed + 10, (20, 21))
        entry = gathered(image, answer, ratio=0.2, names=NAMES[:1])
        (layer,) = layers_of(1, seed)
        for backend in (MbqBackend(loss="mae"), MbqBackend(loss="mse"), MbqBackend(act_bits=8)):
            spec = QuantSpec(3, 16)
            (solution,) = backend.solve([layer], [spec], entry)
            plain = backend.without_inputs(layer, spec)
            errors = {}
            for name, kept in (("balanced", solution.layer), ("plain", plain)):
                power = 2 if backend.loss == "mse" else 1
                parts = [(kept(x) - layer(x)).abs().pow(power).sum() for x in (image, answer)]
                sizes = (len(image), len(answer)) if power == 2 else (1, 1)
                errors[name] = 0.2 * parts[0] / sizes[0] + parts[1] / sizes[1]
            assert errors["balanced"] <= errors["plain"] * (1 + 1e-5)


def test_the_same_statistics_give_the_same_codes():
    entry = gathered(rows(70, 0, (1,)), rows(20, 1), ratio=0.1)
    layers, specs = layers_of(), [QuantSpec(3, 16)] * 2
    assert same(MbqBackend().solve(layers, specs, entry), MbqBackend().solve(layers, specs, copy.deepcopy(entry)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"loss": "rmse"}, "loss must be mae or mse, got 'rmse'"), ({"act_bits": 4}, "act_bits must be 8, or 16")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MbqBackend(**options)


def test_inputs_that_are_not_finite_name_the_layer():
    image = rows(20, 0)
    image[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: its calibration inputs hold NaN"):
        MbqBackend().solve(layers_of(1), [QuantSpec(3, 16)], gathered(image, rows(9, 1)))


def test_roles_are_numbered_as_named():
    assert (ROLES[IMAGE], ROLES[TEXT], ROLES[ANSWER]) == ("image", "text", "answer")
