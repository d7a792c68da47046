"""Static scales per modality: a plain loop on one layer, what calibration finds, and what is refused."""

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.checkpoints.forms import expect_storable
from lmms_plugin.quant_backends.layers.input_rounding import GRANULARITIES, STATIC, InputRounding
from lmms_plugin.quant_backends.layers.modalities import image_rows, read, reading, routed
from lmms_plugin.quant_backends.plans.plan import QuantSpec
from lmms_plugin.quant_backends.statistics import ROLES, InputStatistics
from lmms_plugin.utils.image_positions import image_positions

COLUMNS = 48
METHODS = ("gptq", "awq", "mbq", "smoothquant")
KEPT = {"mbq": {"by_role": True}, "gptq": {"holds_back": True}, "smoothquant": {"keeps_rows": True}}


def inputs(times=20.0):
    """Rows whose image tokens (the first forty) are so many times as large as the others."""
    x = torch.randn(120, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[:40] *= times
    roles = torch.full((120,), ROLES.index("text"), dtype=torch.uint8)
    roles[:40], roles[100:] = ROLES.index("image"), ROLES.index("answer")
    return x, roles


def statistics(x, roles, method="awq"):
    entry = InputStatistics.empty(("layer",), COLUMNS, torch.device("cpu"), **KEPT.get(method, {}))
    entry.add(x, roles, slice(3, None, 4))
    return entry


def linear():
    found, draw = nn.Linear(COLUMNS, 24), torch.Generator().manual_seed(2)
    found.weight.data, found.bias.data = torch.randn(24, COLUMNS, generator=draw), torch.randn(24, generator=draw)
    return found


def solved(method, entry, granularity="modality", name="int8", bits=8, **options):
    backend = get(method, activation_format=name, activation_granularity=granularity, **options)
    return backend.solve([linear()], [QuantSpec(bits, None, True)], entry)[0].layer


@torch.no_grad()
@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7), ("fp8_e4m3", 448)])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_computes_what_a_plain_loop_gives(method, name, largest):
    x, roles = inputs()
    layer = solved(method, statistics(x, roles, method), name=name)
    scaled = x if layer.in_scale is None else x * layer.in_scale
    steps = {True: scaled[:40].abs().max() / largest, False: scaled[40:].abs().max() / largest}
    assert torch.allclose(layer.static_scale, torch.stack([steps[True], steps[False]]), rtol=1e-6)
    # Other rows than in calibration, some of them beyond its range, in two rows of a batch.
    found, is_image = torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 9).bool()
    is_image[0, 2:6], is_image[1, 5:], found[0, 3] = True, True, 1000.0
    weight = layer.weight if layer.in_scale is None else layer.weight / layer.in_scale
    expected = torch.empty(2, 9, 24)
    for row in range(2):
        for position in range(9):
            step = steps[bool(is_image[row, position])]
            vector = found[row, position] * (1 if layer.in_scale is None else layer.in_scale) / step
            if name == "fp8_e4m3":
                vector = vector.clamp(-largest, largest).to(torch.float8_e4m3fn).float()
            else:
                vector = vector.round().clamp(-largest, largest)
            expected[row, position] = weight @ (vector * step) + layer.bias
    with reading(is_image):
        assert torch.allclose(layer(found), expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_equal_ranges_give_one_static_scale_for_all(method):
    x, roles = inputs(times=1.0)
    x[3], x[70] = 0.0, 0.0
    x[3, 0], x[70, 0] = 9.0, -9.0
    for column in range(1, COLUMNS):
        # The largest of every column comes in both modalities, whatever factor a method gives it.
        x[4, column], x[71, column] = 5.0, 5.0
    apart, together = (solved(method, statistics(x, roles, method), one) for one in ("modality", "tensor"))
    assert torch.equal(apart.weight, together.weight)
    with reading(roles == ROLES.index("image")):
        assert torch.equal(apart(x), together(x))


@torch.no_grad()
def test_a_modality_that_is_much_smaller_loses_less():
    x, roles = inputs(times=50.0)
    dense = linear()
    errors = {}
    for granularity in ("tensor", "modality", "token"):
        layer = solved("gptq", statistics(x, roles, "gptq"), granularity)
        with reading(roles == ROLES.index("image")):
            errors[granularity] = float((layer(x)[40:] - dense(x)[40:]).norm())
    assert errors["modality"] < errors["tensor"] / 10
    assert errors["token"] < errors["modality"]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_whose_rows_are_no_positions_has_one_scale(method):
    x, _ = inputs()
    layer = solved(method, statistics(x, None, method))
    assert layer.rounding.label == "int8 inputs per tensor"
    assert torch.equal(layer(x), solved(method, statistics(x, None, method), "tensor")(x))


@torch.no_grad()
def test_a_modality_that_never_came_has_the_scale_of_the_other():
    x, roles = inputs()
    layer = solved("gptq", statistics(x[40:], roles[40:], "gptq"))
    assert layer.static_scale[0] == layer.static_scale[1]


def test_rows_of_part_of_the_positions():
    known = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    with reading(known):
        assert image_rows(torch.empty(2, 4, 3)).tolist() == [False, True, True, False, True, False, False, False]
        assert image_rows(torch.empty(8, 3)).tolist() == known.flatten().tolist()
        # The output projection is given the last positions.
        assert image_rows(torch.empty(2, 2, 3)).tolist() == [True, False, False, False]
        with routed(torch.tensor([4, 0, 2]), 8):
            assert image_rows(torch.empty(3, 5)).tolist() == [True, False, True]
        with routed(torch.tensor([0]), 7), pytest.raises(RuntimeError, match="the model said nothing"):
            image_rows(torch.empty(1, 5))
        with pytest.raises(RuntimeError, match="of 7 rows which are image tokens, but the model said 8 positions"):
            image_rows(torch.empty(7, 3))
    read(None)
    with pytest.raises(RuntimeError, match="activation_granularity=tensor or token need not know"):
        image_rows(torch.empty(2, 3))


def test_positions_are_those_of_the_placeholder_or_of_the_processor_s_marks():
    ids = torch.tensor([[5, 9, 9, 1]])
    assert image_positions(ids, 9).tolist() == [[False, True, True, False]]
    assert not image_positions(ids, None).any()
    assert image_positions(ids, 9, torch.tensor([[0, 0, 1, 2]])).tolist() == [[False, False, True, False]]


def test_refusals_come_before_anything_is_read():
    with pytest.raises(ValueError, match="activation_granularity=modality takes a static scale from calibration"):
        get("rtn", activation_format="int8", activation_granularity="modality")
    with pytest.raises(ValueError, match=r"nvfp4 scales blocks of 16 columns, not each modality"):
        get("gptq", activation_format="nvfp4", activation_granularity="modality")
    with pytest.raises(ValueError, match=r"compressed-tensors cannot hold .* no int8 inputs per modality"):
        expect_storable(get("gptq", activation_format="int8", activation_granularity="modality"), "compressed-tensors")
    assert [InputRounding("int8", one, one in STATIC).by_modality for one in GRANULARITIES] == [False] * 3 + [True]
