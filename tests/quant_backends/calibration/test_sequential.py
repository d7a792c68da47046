"""Block by block: the same statistics as the whole model at once, one block in memory, any family's own way between."""

import copy
import math
import weakref

import pytest
import torch
from helpers.families import FAMILIES
from helpers.recorder import SPEC, Recorder, plain_sums
from loguru import logger
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_plugin.protocol.dialects import dialect_for
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.backend import Solution
from lmms_plugin.quant_backends.calibration.inputs import build_batches
from lmms_plugin.quant_backends.calibration.memory import Residence, Shelf
from lmms_plugin.quant_backends.calibration.sequential import SequentialQuantizer
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.methods.rtn import nearest
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import Quantization, quantize
from lmms_plugin.quant_backends.structure.blocks import find_blocks, within
from lmms_plugin.quant_backends.structure.components import components

EVERYTHING = QuantPlan(vision=SPEC, connector=SPEC, language=SPEC, head=SPEC)


class Sequential(Recorder):
    sequential = True


def plan_of(model):
    """Return a plan for every component that has linear layers."""
    present = set(components(model).values())
    return QuantPlan(**{part: SPEC for part in ("vision", "connector", "language", "head") if part in present})


def loaded(checkpoint, family, count=3):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    spec = CalibrationSpec("noise", samples=count)
    batches, _ = build_batches(model, processor, spec, spec.load_samples(), dialect_for(family), keep_logits=True)
    return model, batches


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_plain_forward_passes_of_the_whole_model(checkpoint, family):
    """Through every mask, rotary axis and deep feature between the blocks; all components at once."""
    model, batches = loaded(checkpoint, family)
    plan = plan_of(model)
    backend = Recorder()
    expected = plain_sums(copy.deepcopy(model), list(components(model)), batches)
    work = quantize(model, backend, plan, batches)
    assert set(backend.seen) == set(expected)
    for name, (gram, magnitude, rows) in expected.items():
        found = backend.seen[name]
        assert found.rows == rows
        scale = float(gram.abs().max())
        torch.testing.assert_close(found.gram.double(), gram, rtol=1e-4, atol=1e-5 * scale, msg=name)
        torch.testing.assert_close(found.magnitude, magnitude, rtol=1e-5, atol=1e-6 * float(magnitude.max()))
    # Vision layers that the model never runs (LLaVA takes the last layer but one) are rounded, and it says so.
    missed = {module.name for module in work.modules() if module.method == "recorder, uncalibrated"}
    assert missed == set(work.specs) - set(expected)


class Judging(Recorder):
    holds_back = True
    rows_per_column = 8


@pytest.mark.parametrize("count", [2, 9])
def test_rows_are_held_back_sample_by_sample_and_too_few_are_warned_of_once(checkpoint, count):
    model, batches = loaded(checkpoint, "qwen2_5_vl", count=count)
    names = list(components(model))
    expected = plain_sums(copy.deepcopy(model), names, batches[3::4])
    everything = plain_sums(copy.deepcopy(model), names, batches)
    backend, said = Judging(), []
    handler = logger.add(said.append, level="WARNING", format="{message}")
    quantize(model, backend, plan_of(model), batches)
    logger.remove(handler)
    for name, (gram, _, rows) in everything.items():
        found = backend.seen[name]
        close = {"rtol": 1e-4, "atol": 1e-5 * float(gram.abs().max()), "msg": name}
        torch.testing.assert_close(found.gram.double(), gram, **close)
        torch.testing.assert_close(found.fitting_gram + found.judging_gram, found.gram, **close)
        if count < 4:
            assert rows / 4 - count <= found.held_back.rows <= rows / 4
        else:
            assert found.held_back.rows == expected[name][2]
            torch.testing.assert_close(found.judging_gram.double(), expected[name][0], **close)
    scarce = {entry.names[0] for entry in backend.seen.values() if entry.rows < 8 * len(entry.gram)}
    assert scarce
    assert len(said) == 1
    assert f"recorder wants 8 calibration inputs for each column of a layer; {len(scarce)} groups of layers" in said[0]
    fewest = min(entry.rows / len(entry.gram) for entry in backend.seen.values())
    assert f"{count} samples were given, calibration_samples={math.ceil(8 * count / fewest)} would do" in said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_backends_see_what_quantized_blocks_put_out(checkpoint, family):
    model, batches = loaded(checkpoint, family, count=2)
    backend = Sequential()
    plan = plan_of(model)
    dense = copy.deepcopy(model)
    work = quantize(model, backend, plan, batches)
    blocks = [layers for layers in find_blocks(dense, tuple(work.specs)).values() if layers]
    inputs_of_quantized = plain_sums(model, list(work.specs), batches)
    for layers in blocks:
        seen = [name for name in layers if name in backend.seen]
        if not seen:
            continue
        # The first layers of a block are fed by quantized blocks alone.
        first = seen[0]
        gram = inputs_of_quantized[first][0]
        scale = float(gram.abs().max())
        torch.testing.assert_close(backend.seen[first].gram.double(), gram, rtol=1e-3, atol=1e-4 * scale, msg=first)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_cover_every_layer_once(checkpoint, family):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    layers = tuple(components(model))
    blocks = find_blocks(model, layers)
    assert sorted(layer for inside in blocks.values() for layer in inside) == sorted(layers)
    assert not any(within(one, other) for one in blocks for other in blocks if one != other)
    decoder = [name for name, inside in blocks.items() if any(name.endswith("down_proj") for name in inside)]
    assert sum("vis" not in name for name in decoder) == 2


def test_statistics_do_not_depend_on_the_budget(checkpoint):
    seen = []
    for budget in (1, None):
        model, batches = loaded(checkpoint, "qwen3_vl", count=2)
        backend, work = Recorder(), Quantization(model, get("none"), QuantPlan())
        specs = dict.fromkeys(work.components, SPEC)
        SequentialQuantizer(model, backend, specs, lambda name, entry: None, budget=budget).run(batches)
        seen.append(backend.seen)
    one, other = seen
    assert set(one) == set(other)
    for name, statistics in one.items():
        assert torch.equal(statistics.gram, other[name].gram)
        assert torch.equal(statistics.magnitude, other[name].magnitude)


class Elsewhere(Residence):
    """A stand-in for an accelerator: what is on it are copies that it has made."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.copies = {}

    def arrived(self, tensor):
        if tensor.data_ptr() in self.copies:
            return None
        copied = tensor.detach().clone()
        self.copies[copied.data_ptr()] = copied
        return copied

    def present(self, model):
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        return {name for name, tensor in tensors.items() if tensor.data_ptr() in self.copies}


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "paligemma"])
def test_a_block_arrives_whole_and_goes_home_unchanged(checkpoint, family):
    model, _ = loaded(checkpoint, family, count=1)
    home = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model, tuple(components(model)))
    residence = Elsewhere()
    residence.settle(model, blocks)
    outside = residence.present(model)
    assert any(name.endswith("embed_tokens.weight") for name in outside)
    for block in blocks:
        residence.enter(block)
        mine = {name for name in home if within(name, block)}
        assert {name for name in residence.present(model) if within(name, block)} >= mine
        assert not {
            name for name in residence.present(model) - outside - mine if not name.endswith("embed_tokens.weight")
        }
        residence.leave(block)
        assert residence.present(model) == outside
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, home[name][1])
        assert name in outside or tensor.data_ptr() == home[name][0]


@pytest.mark.parametrize("family", ["qwen3_vl", "paligemma"])
def test_no_more_than_one_dense_block_is_on_the_device(checkpoint, family):
    """And in the end everything is, packed, with the codes of a calibration that moves nothing."""
    results = []
    for residence in (Elsewhere(), None):
        model, batches = loaded(checkpoint, family, count=2)
        backend = get("awq")
        work = Quantization(model, backend, plan_of(model))
        block_of = {layer: block for block, inside in find_blocks(model, tuple(work.specs)).items() for layer in inside}
        dense = []
        if residence is not None:
            original = work.replace

            def watch(
                name,
                *args,
                original=original,
                model=model,
                residence=residence,
                dense=dense,
                block_of=block_of,
                **kwargs,
            ):
                here = residence.present(model)
                dense.append({block_of[layer] for layer in block_of if f"{layer}.weight" in here} - {"lm_head"})
                original(name, *args, **kwargs)

            work.replace = watch
        work.finish(batches, residence=residence)
        if residence is not None:
            assert max(map(len, dense)) == 1
            assert not [name for name, p in model.named_parameters() if p.data_ptr() not in residence.copies]
        results.append({name: m.state_dict() for name, m in model.named_modules() if isinstance(m, PackedLinear)})
    one, other = results
    assert set(one) == set(other)
    assert all(torch.equal(value, other[name][key]) for name in one for key, value in one[name].items())


class Narrow(Elsewhere):
    """A device that the model does not fit into."""

    def fits(self):
        return False


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("device", [Elsewhere, Narrow])
@torch.no_grad()
def test_the_whole_model_answers_on_a_device_whether_it_fits_or_not(checkpoint, family, device):
    model, (batch, *_) = loaded(checkpoint, family, count=1)
    batch = {key: value for key, value in batch.items() if key != "use_cache"}
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**batch, **options)
    blocks = find_blocks(model, tuple(components(model)))
    residence = device()
    residence.settle(model, blocks)
    outside = residence.present(model)
    most = []
    watched = [model.get_submodule(name) for name in blocks if "layers" in name]
    for block in watched:
        block.register_forward_hook(lambda *_: most.append(residence.present(model) - outside))
    with residence.whole():
        assert torch.equal(model.generate(**batch, **options), expected)
    assert residence.present(model) == outside
    together = max(len({block for block in blocks for name in names if within(name, block)}) for names in most)
    # A tied output projection is the embedding, which is there all the time.
    movable = [block for block in blocks if block != "lm_head" or "lm_head.weight" not in outside]
    assert together == (len(movable) if device is Elsewhere else 1)


class AlwaysAway(Shelf):
    """Sends everything away, and lets nobody read it meanwhile."""

    def __init__(self):
        super().__init__(budget=0)
        self.trips = self.returns = 0

    def waits_on_device(self, tensor):
        return True

    def sent_away(self, tensor):
        self.trips += 1
        return tensor.double() if tensor.is_floating_point() else tensor.clone()

    def brought_back(self, tensor, device):
        self.returns += 1
        return tensor.float() if tensor.dtype == torch.float64 else tensor.clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_waiting_activations_may_lie_elsewhere(checkpoint, family):
    """While they wait they have another dtype, so that whoever touched them would show in the statistics."""
    seen = []
    away = AlwaysAway()
    for shelf in (away, Shelf()):
        model, batches = loaded(checkpoint, family, count=2)
        backend = Recorder()
        specs = dict.fromkeys(components(model), SPEC)
        SequentialQuantizer(model, backend, specs, lambda name, entry: None, shelf=shelf).run(batches)
        seen.append(backend.seen)
    assert away.returns == away.trips > 0, "nothing is left there"
    assert seen[0].keys() == seen[1].keys()
    for name, statistics in seen[0].items():
        assert torch.equal(statistics.gram, seen[1][name].gram)


def test_dense_weights_of_a_finished_block_are_freed(checkpoint):
    """When a block is solved, no earlier one has a dense layer left, and no sample holds more than one activation."""
    model, batches = loaded(checkpoint, "idefics3", count=2)
    alive = {}
    for name in components(model):
        alive[name] = weakref.ref(model.get_submodule(name))
    peaks = []

    class Watching(Recorder):
        def solve(self, layers, specs, statistics):
            self.seen[statistics.names[0]] = None
            block = statistics.names[0].rpartition(".layers.")[2][0]
            done = [name for name in order if name.rpartition(".layers.")[2][0] != block]
            order.extend(statistics.names)
            peaks.append([name for name in done if alive[name]() is not None])
            return [Solution(nearest(layer, spec)) for layer, spec in zip(layers, specs, strict=True)]

    order = []
    quantize(model, Watching(), QuantPlan(language=SPEC), batches)
    assert len(peaks) == 8
    assert not any(peaks)


class Twice(nn.Module):
    """One list of blocks that is gone through twice, and a layer that is called past its block."""

    def __init__(self, times):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2)])
        self.outside = nn.Sequential(nn.Linear(32, 32))
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x)
        return self.outside[0](x)


@pytest.mark.parametrize("times", [1, 2])
def test_models_that_cannot_be_taken_apart_are_calibrated_all_the_same(times):
    torch.manual_seed(0)
    model = Twice(times).eval()
    batches = [{"x": torch.randn(4, 32)} for _ in range(3)]
    names = ("blocks.0.0", "blocks.1.0", "outside.0")
    expected = plain_sums(model, names, batches)
    backend, put = Recorder(), {}
    SequentialQuantizer(model, backend, dict.fromkeys(names, SPEC), put.__setitem__).run(batches)
    assert set(put) == set(names)
    for name in names:
        torch.testing.assert_close(backend.seen[name].gram.double(), expected[name][0], rtol=1e-4, atol=1e-4)
        assert backend.seen[name].rows == 4 * 3 * (times if name != "outside.0" else 1)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Experts(nn.Module):
    """Which expert a sample meets depends on its first number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.layers[0].forward = lambda x: self.layers[0].experts[int(x[0, 0] > 0)](x)

    def forward(self, x):
        return self.layers[0](x)


def test_experts_that_the_first_sample_does_not_meet_are_calibrated_by_those_that_do():
    torch.manual_seed(0)
    model = Experts().eval()
    batches = [{"x": torch.full((2, 32), value)} for value in (1.0, -2.0, -3.0)]
    names = tuple(f"layers.0.experts.{index}" for index in range(3))
    backend, put = Recorder(), {}
    SequentialQuantizer(model, backend, dict.fromkeys(names, SPEC), put.__setitem__).run(batches)
    assert [backend.seen[name].rows for name in names[:2]] == [4, 2]
    assert {name: entry.method for name, entry in put.items()} == {
        names[0]: None,
        names[1]: None,
        names[2]: "recorder, uncalibrated",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_layer_and_sample_and_leave_nothing_behind(value):
    model = Twice(1).eval()
    batches = [{"x": torch.randn(4, 32)} for _ in range(3)]
    batches[2]["x"][1, 1] = value
    put = {}
    with pytest.raises(
        ValueError, match=r"blocks\.0\.0: its inputs hold NaN or infinite values in calibration sample 2"
    ):
        SequentialQuantizer(model, Recorder(), {"blocks.0.0": SPEC}, put.__setitem__).run(batches)
    assert not put
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_sample_at_all_is_an_error():
    with pytest.raises(ValueError, match="given no calibration sample"):
        SequentialQuantizer(Twice(1), Recorder(), {"blocks.0.0": SPEC}, {}.__setitem__).run([])


def test_awq_gives_the_same_codes_alone_and_among_others(checkpoint):
    """What a layer gets does not depend on what else the plan quantizes: its inputs are those of the dense model."""
    states = []
    for plan in (QuantPlan(language=SPEC), EVERYTHING):
        model, batches = loaded(checkpoint, "idefics3", count=2)
        quantize(model, get("awq"), plan, batches)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear) and "text_model" in n}
        states.append({f"{name}.{key}": v for name, m in layers.items() for key, v in m.state_dict().items()})
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
