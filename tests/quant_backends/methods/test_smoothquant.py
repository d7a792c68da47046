"""SmoothQuant: the paper's scales and products written down plainly, the search exhaustively, folding bit for bit."""

import pytest
import torch
from PIL import Image
from torch import nn

from lmms_plugin.demo import CHECKPOINT
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.calibration.inputs import encode, to_model
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.folding import fold
from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.quant_backends.layers.int8_inputs import Int8InputLinear
from lmms_plugin.quant_backends.methods.rtn_grid import round_by_blocks
from lmms_plugin.quant_backends.methods.smoothquant import ALPHAS
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.statistics import InputStatistics

COLUMNS = 64
W8 = QuantSpec(8, None, True)


def linear(rows, seed):
    torch.manual_seed(seed)
    return nn.Linear(COLUMNS, rows)


def inputs(rows=400, seed=3):
    """Return inputs (rows, columns) with a few channels of outliers, one of them always zero."""
    x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    x[:, ::16] *= 60
    x[:, 5] = 0
    return x


def statistics(x, names=("layer",)):
    entry = InputStatistics.empty(names, COLUMNS, torch.device("cpu"), keeps_rows=True)
    entry.add(x)
    return entry


def plain(x, weight, bias, scale):
    """W8A8 of smoothed inputs, a scale per token, and of smoothed weights rounded to nearest, in float64."""
    x = x.double() / scale
    steps = x.abs().amax(1, keepdim=True) / 127
    stored = round_by_blocks((weight.double() * scale).float(), W8).dequantize(8, torch.float64)
    return (x / steps).round() * steps @ stored.T + bias.double()


def papers_scale(x, weights, alpha):
    """max|X_j|^α / max|W_j|^(1−α), one column after another."""
    found = torch.ones(COLUMNS, dtype=torch.float64)
    for column in range(COLUMNS):
        largest = max(float(weight[:, column].abs().max()) for weight in weights)
        if float(x[:, column].abs().max()) > 0:
            found[column] = float(x[:, column].abs().max()) ** alpha / largest ** (1 - alpha)
    return found


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_scales_and_outputs_are_the_papers(alpha):
    layers, x = [linear(24, 0), linear(40, 1)], inputs()
    found = get("smoothquant", alpha=alpha).solve(layers, [W8, W8], statistics(x, ("one", "other")))
    scale = papers_scale(x, [layer.weight for layer in layers], alpha)
    for (solved, method, _), layer in zip(found, layers, strict=True):
        assert isinstance(solved, Int8InputLinear)
        assert method is None
        torch.testing.assert_close(1 / solved.in_scale.double(), scale, rtol=1e-5, atol=0)
        expected = plain(x, layer.weight, layer.bias, 1 / solved.in_scale.double())
        error = (solved(x).double() - expected).norm() / expected.norm()
        assert error < 5e-4, "up to ties of rounding that float32 and float64 see differently"


def relative(solved, layer, x):
    return float((solved(x) - layer(x)).norm() / layer(x).norm())


@torch.no_grad()
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "int4"])
def test_the_search_takes_the_strength_with_the_least_error(name):
    layer, x = linear(24, 0), inputs()
    (found,) = get("smoothquant", activation_format=name).solve([layer], [W8], statistics(x))
    (rounded,) = [get("rtn", activation_format=name).quantize_linear(layer.weight, layer.bias, W8)]
    given = [
        get("smoothquant", activation_format=name, alpha=alpha).solve([layer], [W8], statistics(x))[0].layer
        for alpha in ALPHAS
    ]
    errors = [relative(one, layer, x) for one in (rounded, *given)]
    assert relative(found.layer, layer, x) <= min(errors) * (1 + 1e-4)


@torch.no_grad()
def test_outliers_cost_less_than_with_rounding_alone():
    layer, x, unseen = linear(24, 0), inputs(), inputs(seed=9)
    rounded = get("rtn", activation_format="int8").quantize_linear(layer.weight, layer.bias, W8)
    for alpha in (None, 0.5):
        (found,) = get("smoothquant", alpha=alpha).solve([layer], [W8], statistics(x))
        assert relative(found.layer, layer, unseen) < 0.5 * relative(rounded, layer, unseen)


@torch.no_grad()
def test_folded_scales_are_powers_of_two_and_only_where_a_layer_can_take_them_over():
    layer, x = linear(24, 0), inputs()
    entry = statistics(x)
    (found,) = get("smoothquant", alpha=0.5, fold=True).solve([layer], [W8], entry)
    assert torch.equal(found.layer.in_scale.log2().round().exp2(), found.layer.in_scale)
    assert found.layer.in_scale.unique().numel() > 2
    entry.names = ("layers.0.self_attn.o_proj",)
    assert get("smoothquant", fold=True).solve([layer], [W8], entry)[0].layer.in_scale is None


@torch.no_grad()
@pytest.mark.model
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_folding_changes_no_bit(name, tmp_path):
    plan = QuantPlan.from_arguments(bits=8, group_size=-1, symmetric=True)
    backend = get("smoothquant", fold=True, alpha=0.5, activation_format=name)
    loaded = load_quantized(
        str(CHECKPOINT),
        backend=backend,
        plan=plan,
        dtype=torch.float32,
        calibration=CalibrationSpec("noise", samples=2),
    )
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    fed = {**to_model(encode(loaded.processor, image, "Where?"), loaded.model), "use_cache": False}
    before = loaded.model(**fed).logits
    scaled = [layer for layer in loaded.model.modules() if getattr(layer, "in_scale", None) is not None]
    assert any((layer.in_scale != 1).any() for layer in scaled)
    if name == "int8":
        saved = save_quantized(
            loaded.model, loaded.processor, loaded.report, tmp_path / "it", form="compressed-tensors"
        )
        assert (saved.format, saved.reason) == ("compressed-tensors", None)
        again = load_quantized(str(tmp_path / "it"), backend=get("prequantized"), plan=QuantPlan())
        assert torch.equal(again.model(**fed).logits, before)
    else:
        assert fold(loaded.model, fed) == ()
        assert not any(getattr(layer, "in_scale", None) is not None for layer in loaded.model.modules())
    assert torch.equal(loaded.model(**fed).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.2}, "smoothquant: alpha must be a number from 0 to 1, got 1.2"),
        ({"activation_format": None}, "smoothquant: expected an activation_format, got None"),
        ({"format": "fp8_e4m3_tensor", "fold": True}, "smoothquant: fold=True multiplies single rows of layers before"),
        ({"activation_format": "int4_asym"}, "activation_format=int4_asym is a format of weights"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        get("smoothquant", **options)
