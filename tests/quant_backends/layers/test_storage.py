"""Storage while answering: what a layer is does not change, and dense products are the same kept or made."""

import copy
import json

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.formats.entries import format_of
from lmms_plugin.quant_backends.layers import kernels, native_kernels, weight_storage
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.gemlite_kernel import Gemlite
from lmms_plugin.quant_backends.layers.input_rounding import InputRounding
from lmms_plugin.quant_backends.layers.int8_inputs import Int8InputLinear
from lmms_plugin.quant_backends.layers.kernels import MOST_ROWS, Dequantize, Shape
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundedInputLinear
from lmms_plugin.quant_backends.layers.weight_storage import DenseBudget, settle
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec

ROWS, COLUMNS = 96, 160
DTYPES = (torch.float32, torch.bfloat16)
needs_int4 = pytest.mark.skipif(native_kernels.tile_height() is None, reason="torch's int4 layout here is not known")


class Plenty(DenseBudget):
    """A budget of so many bytes."""

    def __init__(self, size=1 << 40):
        super().__init__()
        self.size = size

    def left(self, device):
        return self.size

    def take(self, device, size):
        self.size -= size


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(dtype, *, kind=PackedLinear, bits=4, group_size=64, symmetric=False, in_scale=False, columns=COLUMNS):
    spec = QuantSpec(bits, group_size, symmetric)
    weight = drawn(ROWS, columns) + drawn(ROWS, 1, seed=1)
    layer = kind.from_codes(
        round_to_nearest(weight, spec, dtype),
        spec,
        columns,
        bias=nn.Parameter(drawn(ROWS, seed=2).to(dtype), requires_grad=False),
        in_scale=drawn(columns, seed=3).abs().to(dtype) if in_scale else None,
    )
    if kind is RoundedInputLinear:
        layer.rounding = InputRounding.of("fp8_e4m3", "token")
    return layer


def in_format(dtype, rounding=None):
    codes = FormatCodes.of(drawn(ROWS, COLUMNS), format_of("mxfp4"))
    return FormatLinear.from_codes(codes, dtype, rounding=rounding)


def ternary(dtype):
    weight = drawn(ROWS, COLUMNS).to(dtype)
    return get("ptqtp", starts=1, max_iterations=2).quantize_linear(weight, None, QuantSpec(3, 64))


def nf4(dtype):
    pytest.importorskip("bitsandbytes")
    return get("bitsandbytes").quantize_linear(drawn(ROWS, COLUMNS).to(dtype), None, QuantSpec(4, 64))


LAYERS = {
    "4 bits": packed,
    "3 bits, symmetric": lambda dtype: packed(dtype, bits=3, symmetric=True),
    "8 bits": lambda dtype: packed(dtype, bits=8),
    "scaled inputs": lambda dtype: packed(dtype, in_scale=True),
    "whole rows": lambda dtype: packed(dtype, group_size=None),
    "rounded inputs": lambda dtype: packed(dtype, kind=RoundedInputLinear),
    "int8 inputs, groups": lambda dtype: packed(dtype, kind=Int8InputLinear),
    "int8 inputs, rows": lambda dtype: packed(dtype, kind=Int8InputLinear, group_size=None),
    "mxfp4": in_format,
    "mxfp4, rounded inputs": lambda dtype: in_format(dtype, InputRounding.of("mxfp8", "block")),
    "ternary": ternary,
    "nf4": nf4,
}


def without_kernel(layer):
    """Make rows for every product, as where there is no kernel."""
    if isinstance(layer, PackedLinear):
        layer.keep()
        layer.drop()
        layer.packed.takes_rows = lambda rows, dtype: False
        layer.choose_kernel = lambda: None
    return layer


@pytest.mark.parametrize("blocks", ["one block", "several blocks"])
@pytest.mark.parametrize("rows", [1, 7, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dense_weights_kept_or_made_give_the_same_to_the_last_bit(monkeypatch, kind, dtype, rows, blocks):
    if blocks == "several blocks":
        monkeypatch.setitem(kernels.BLOCK_ELEMENTS, "cpu", 32 * COLUMNS)
    layer = LAYERS[kind](dtype)
    x = drawn(1, rows, COLUMNS, seed=4).to(dtype)
    made = without_kernel(copy.deepcopy(layer))(x)
    layer.keep()
    assert torch.equal(layer(x), made)
    assert made.abs().sum() > 0


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rows", [kernels.FEW_ROWS, kernels.FEW_ROWS + 1])
def test_many_rows_of_16_bits_are_multiplied_in_the_dtype_that_is_fastest(rows, kept):
    layer = without_kernel(packed(torch.bfloat16))
    weight, bias, x = layer.operand(0, ROWS, torch.bfloat16), layer.bias, drawn(rows, COLUMNS, seed=4).bfloat16()
    if kept:
        layer.keep()
    wide = torch.bfloat16 if rows <= kernels.FEW_ROWS else kernels.arithmetic_dtype(torch.bfloat16, "cpu")
    expected = nn.functional.linear(x.to(wide), weight.to(wide), bias.to(wide)).bfloat16()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_what_it_was(kind, dtype):
    layer = LAYERS[kind](dtype)
    before, weight = copy.deepcopy(layer.state_dict()), layer.weight
    canonical = without_kernel(copy.deepcopy(layer)).weight_bytes
    layer.keep()
    after = layer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(layer.weight, weight)
    assert layer.weight_bytes == canonical
    per_weight = torch.empty((), dtype=layer.operand_dtype).element_size()
    assert layer.resident_bytes == layer.weight_bytes + ROWS * COLUMNS * per_weight
    assert layer.kept.numel() == ROWS * COLUMNS
    layer.drop()
    assert layer.kept is None
    size = layer.weight_bytes
    assert layer.resident_bytes == size


def test_dense_weights_follow_a_layer_that_changes():
    layer = packed(torch.bfloat16)
    layer.keep()
    x = drawn(2, COLUMNS, seed=4)
    wide = copy.deepcopy(layer).float()
    assert wide.kept.dtype == torch.float32
    expected = packed(torch.bfloat16).float()
    assert torch.equal(wide(x), expected(x))
    other = packed(torch.bfloat16, bits=4, symmetric=False)
    other.packed.scale.mul_(2)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.kept, 2 * packed(torch.bfloat16).operand(0, ROWS, layer.operand_dtype))


@needs_int4
@pytest.mark.parametrize("kernel_rows", [1, 8])
def test_a_kernel_multiplies_up_to_so_many_rows_and_dense_weights_above(kernel_rows):
    layer = packed(torch.bfloat16, columns=192)
    assert layer.kernel == "torch CPU int4"
    by_kernel, dense = copy.deepcopy(layer), without_kernel(copy.deepcopy(layer))
    layer.keep(kernel_rows)
    for rows in (1, kernel_rows, kernel_rows + 1, 80):
        x = drawn(rows, 192, seed=rows).bfloat16()
        expected = by_kernel if rows <= kernel_rows else dense
        assert torch.equal(layer(x), expected(x))
    assert layer.kernel.startswith(f"torch CPU int4 up to {kernel_rows} rows, dense ")


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def dense_of(held):
    return [one.dense for one in held.values()]


def test_auto_keeps_what_fits_in_the_order_of_the_model():
    model = Model(*(packed(torch.float32) for _ in range(3)))
    held = settle(model, "auto", budget=Plenty(2 * 4 * ROWS * COLUMNS + 1))
    assert dense_of(held) == [True, True, False]
    assert list(held) == ["layers.0", "layers.1", "layers.2"]
    assert [one.kernel for one in held.values()] == ["dense float32", "dense float32", "dequantize"]
    x = drawn(3, COLUMNS)
    assert torch.equal(model.layers[0](x), model.layers[2](x))


def test_packed_keeps_nothing():
    held = settle(Model(packed(torch.float32), in_format(torch.float32)), "packed", budget=Plenty())
    assert dense_of(held) == [False, False]


def test_dense_that_does_not_fit_is_refused_before_anything_is_made():
    model = Model(packed(torch.float32), packed(torch.float32))
    with pytest.raises(ValueError, match=r"^storage=dense: the weights take 0\.0 GB on cpu.*storage=auto keeps"):
        settle(model, "dense", budget=Plenty(4 * ROWS * COLUMNS))
    assert [layer.kept for layer in model.layers] == [None, None]


def test_dense_is_refused_where_a_library_multiplies():
    layer = get("quanto").quantize_linear(drawn(ROWS, COLUMNS), None, QuantSpec(8, 64))
    held = settle(Model(packed(torch.float32), layer), "auto", budget=Plenty())
    assert dense_of(held) == [True, False]
    with pytest.raises(ValueError, match=r"^storage=dense: layers\.1 \(quanto .*\) cannot be kept dense: a library"):
        settle(Model(packed(torch.float32), layer), "dense", budget=Plenty())


@needs_int4
@pytest.mark.parametrize("kernel_rows", [0, 1, 64])
def test_a_choice_that_was_timed_is_taken_again(tmp_path, monkeypatch, kernel_rows):
    monkeypatch.setattr(weight_storage, "timed_rows", lambda *_: kernel_rows)
    first = settle(Model(packed(torch.bfloat16, columns=192)), "auto", budget=Plenty(), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["rows"] == kernel_rows
    monkeypatch.setattr(weight_storage, "timed_rows", lambda *_: pytest.fail("it is timed again"))
    second = settle(Model(packed(torch.bfloat16, columns=192)), "auto", budget=Plenty(), folder=tmp_path)
    assert first == second
    (told,) = first.values()
    assert told.kernel.startswith(f"torch CPU int4 up to {kernel_rows} rows, " if kernel_rows else "dense ")


@needs_int4
@pytest.mark.parametrize("content", ["", "[]", '{"rows": -1}', '{"rows": "8"}'])
def test_a_damaged_choice_is_timed_anew(tmp_path, content):
    model = Model(packed(torch.bfloat16, columns=192))
    settle(model, "auto", budget=Plenty(), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["rows"] in (0, *weight_storage.ROWS, MOST_ROWS["torch CPU int4"])
    file.write_text(content)
    (told,) = settle(Model(packed(torch.bfloat16, columns=192)), "auto", budget=Plenty(), folder=tmp_path).values()
    assert told.dense


def test_a_kernel_without_reproducible_sums_is_not_chosen_for_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(native_kernels.CpuInt4, "reproducible", False)
    monkeypatch.setattr(weight_storage, "timed_rows", lambda *_: 64)
    (told,) = settle(Model(packed(torch.bfloat16)), "auto", budget=Plenty(), folder=tmp_path).values()
    assert told.kernel.startswith("dense ")


def test_memory_is_left_to_everything_else(monkeypatch):
    monkeypatch.setattr(weight_storage, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(weight_storage, "total_host_bytes", lambda: 2000)
    budget = DenseBudget(processes=2)
    assert budget.left(torch.device("cpu")) == (1000 - 0.2 * 2000) // 2
    budget.take(torch.device("cpu"), 100)
    assert budget.left(torch.device("cpu")) == 200


@pytest.mark.parametrize(
    ("method", "bits", "says"),
    [
        ("quanto", 4, "optimum-quanto multiplies by tensors of its own"),
        ("torchao", 8, "torchao multiplies by tensors of its own"),
        ("bitsandbytes", 8, "LLM.int8"),
    ],
)
def test_methods_refuse_dense_weights_before_anything_is_loaded(method, bits, says):
    plan = QuantPlan.from_arguments(bits=bits)
    with pytest.raises(ValueError, match=f"^storage=dense: .*{says}.*leave storage out$"):
        get(method).check_storage("dense", plan)
    get(method).check_storage("auto", plan)
    get("rtn").check_storage("dense", plan)


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        (Shape(4, 64, 256, 64, torch.bfloat16, "cuda"), True),
        (Shape(8, 64, 256, 256, torch.float16, "cuda"), True),
        (Shape(2, 64, 192, 192, torch.bfloat16, "cuda"), True),
        (Shape(3, 64, 256, 64, torch.bfloat16, "cuda"), False),
        (Shape(4, 64, 288, 96, torch.bfloat16, "cuda"), False),
        (Shape(4, 64, 256, 64, torch.float32, "cuda"), False),
        (Shape(4, 64, 256, 64, torch.bfloat16, "cpu"), False),
    ],
)
def test_which_weights_gemlite_takes(monkeypatch, shape, taken):
    monkeypatch.setattr("lmms_plugin.quant_backends.layers.gemlite_kernel.is_installed", lambda: True)
    assert Gemlite.takes(shape) == taken
    monkeypatch.setattr("lmms_plugin.quant_backends.layers.gemlite_kernel.is_installed", lambda: False)
    assert not Gemlite.takes(shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gemlite_gives_the_product_and_the_codes(bits):
    pytest.importorskip("gemlite")
    spec = QuantSpec(bits, 64)
    codes = round_to_nearest(drawn(64, 256), spec, torch.bfloat16)
    there = Dequantize.from_codes(codes, bits).to("cuda")
    kernel = Gemlite.from_codes(there.codes(0, 64), bits)
    for rows in (1, 5, 80):
        x = drawn(rows, 256, seed=1).bfloat16().cuda()
        expected = there.dequantized_matmul(x.float())
        assert float((kernel.matmul(x).float() - expected).norm() / expected.norm()) < 2**-5
    back = kernel.canonical().codes(0, 64)
    assert all(a is b or torch.equal(a.cpu(), b) for a, b in zip(back, codes, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [name for name in LAYERS if name != "nf4"])
def test_codes_lie_in_host_memory_where_dense_weights_are_kept_on_a_gpu(kind):
    layer = LAYERS[kind](torch.bfloat16).cuda()
    x = drawn(3, COLUMNS, seed=4).bfloat16().cuda()
    made = without_kernel(copy.deepcopy(layer))(x)
    layer.keep()
    assert torch.equal(layer(x), made)
    assert layer.kept.is_cuda
    assert {buffer.device.type for name, buffer in layer.named_buffers() if "plane" in name} == {"cpu"}
    layer.drop()
    assert all(buffer.is_cuda for buffer in layer.buffers())
    assert torch.equal(without_kernel(layer)(x), made)
