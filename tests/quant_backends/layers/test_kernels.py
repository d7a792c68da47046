"""Kernels of packed layers: the same weight in another layout, the same product, and nothing held twice."""

import copy
import re

import pytest
import torch
from loguru import logger

from lmms_plugin.quant_backends.layers import kernel_choice, kernels, native_kernels
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.kernel_choice import fastest
from lmms_plugin.quant_backends.layers.kernels import MOST_ROWS, Dequantize
from lmms_plugin.quant_backends.layers.linear import PackedLinear
from lmms_plugin.quant_backends.layers.native_kernels import CpuInt4, CpuInt8, CudaInt4, from_tiles, to_tiles
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantSpec

HAS_INT4 = native_kernels.tile_height() is not None
needs_int4 = pytest.mark.skipif(not HAS_INT4, reason="torch's int4 layout on this processor is not known")


def weight(bits, *, rows=48, columns=256, group_size=64, kind="asymmetric", dtype=torch.bfloat16, seed=0):
    """Return codes of a random weight whose groups lie around different means, so that zero points differ."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator) + torch.randn(rows, 1, generator=generator)
    codes = round_to_nearest(dense, QuantSpec(bits, group_size, kind == "symmetric"), dtype)
    if kind == "real zeros":
        moved = codes.zero_point.float() + torch.rand(codes.zero_point.shape, generator=generator)
        codes = codes._replace(zero_point=moved.to(dtype))
    return codes


def exact_product(x, codes, bits):
    """x times the weight that codes stand for, all in float64."""
    zero = torch.tensor(2.0 ** (bits - 1)) if codes.zero_point is None else codes.zero_point.unsqueeze(-1)
    dense = (codes.codes.double() - zero.double()) * codes.scale.double().unsqueeze(-1)
    return x.double() @ dense.flatten(1).T


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def same(a, b):
    return all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "real zeros"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)],
    ids=["float32", "float16", "bfloat16"],
)
def test_every_kernel_gives_the_product_of_the_weight(bits, kind, rows, dtype, tolerance):
    codes = weight(bits, kind=kind, dtype=dtype)
    kernel = fastest(Dequantize.from_codes(codes, bits))
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert relative(kernel.matmul(x), exact_product(x, codes, bits)) < tolerance
    assert kernel.matmul(x).dtype == dtype


@needs_int4
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "real zeros"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(16, 32, 32), (48, 320, None), (112, 192, 96), (160, 1024, 512)],
    ids=["smallest", "whole rows", "group of three", "group of two"],
)
def test_layouts_give_codes_back_bit_for_bit(bits, kind, rows, columns, group_size):
    codes = weight(bits, rows=rows, columns=columns, group_size=group_size, kind=kind)
    kernel = fastest(Dequantize.from_codes(codes, bits))
    assert isinstance(kernel, CpuInt8 if bits == 8 else CpuInt4)
    assert same(kernel.codes(0, rows), codes)
    assert same(kernel.codes(3, 11), [None if part is None else part[3:11] for part in codes])
    assert same(kernel.canonical().codes(0, rows), codes)


@needs_int4
@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 96, 160, 208])
def test_tiles_of_any_number_of_rows(rows):
    values = torch.randint(0, 16, (rows, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiles = to_tiles(values)
    assert tiles.numel() == values.numel() // 2
    assert torch.equal(from_tiles(tiles, 32), values)


@needs_int4
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_held_once_and_take_their_bits(bits):
    spec = QuantSpec(bits, 64)
    layer = PackedLinear.from_codes(weight(bits, columns=512), spec, 512)
    assert layer.kernel.startswith("torch CPU int")
    groups, numbers = 48 * 512 // 64, 1 if bits <= 4 else 2
    around_codes = groups * (3 if bits == 8 else 4 * numbers)
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in layer.buffers()}
    assert layer.weight_bytes == sum(storages.values()) == 48 * 512 * bits // 8 + around_codes


@needs_int4
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_many_rows_are_multiplied_densely(bits):
    codes = weight(bits)
    kernel = fastest(Dequantize.from_codes(codes, bits))
    rows = MOST_ROWS[kernel.name] + 1
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(kernel.matmul(x), Dequantize.from_codes(codes, bits).matmul(x))


@pytest.mark.parametrize(
    "options",
    [{"rows": 20}, {"group_size": 16}, {"dtype": torch.float32}, {"dtype": torch.float16}],
    ids=["rows", "group", "float32", "float16"],
)
def test_what_torch_has_no_kernel_for_is_dequantized(options):
    layer = PackedLinear.from_codes(weight(4, **options), QuantSpec(4, options.get("group_size", 64)), 256)
    assert layer.kernel == "dequantize"


@needs_int4
def test_an_input_of_another_dtype_still_gets_its_answer():
    codes = weight(4)
    layer = PackedLinear.from_codes(codes, QuantSpec(4, 64), 256)
    assert layer.kernel == "torch CPU int4"
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    assert relative(layer(x), exact_product(x, codes, 4)) < 1e-6


@needs_int4
@pytest.mark.parametrize("bits", [3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "real zeros"])
def test_state_dicts_do_not_depend_on_the_kernel(bits, kind):
    spec = QuantSpec(bits, 64, symmetric=kind == "symmetric")
    idle, used = (PackedLinear.from_codes(weight(bits, kind=kind), spec, 256) for _ in range(2))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    answer = used(x)
    assert used.kernel != "dequantize"
    before, after = idle.state_dict(), used.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = PackedLinear.from_codes(weight(bits, kind=kind, seed=7), spec, 256)
    assert not torch.equal(other(x), answer)
    other.load_state_dict(after)
    assert torch.equal(other(x), answer)


@needs_int4
def test_a_layer_that_moves_takes_another_kernel():
    layer = PackedLinear.from_codes(weight(4), QuantSpec(4, 64), 256)
    assert layer.kernel == "torch CPU int4"
    twin = copy.deepcopy(layer).float()
    assert twin.kernel == "dequantize"
    assert twin.weight.dtype == torch.float32
    assert layer.kernel == "torch CPU int4"
    assert same(twin.bfloat16().quantized, layer.quantized)
    assert twin.kernel == "torch CPU int4"


class Wrong(Dequantize):
    """A kernel that doubles every product."""

    name = "wrong"

    def matmul(self, x):
        return 2 * super().matmul(x)


class Broken(Dequantize):
    """A kernel that torch refuses."""

    name = "broken"

    def matmul(self, x):
        raise RuntimeError("no such operator")


class Missing(Dequantize):
    """A kernel that this build of torch lacks."""

    name = "missing"

    def matmul(self, x):
        return torch.ops.aten._no_such_kernel(x)


class Forgetful(Dequantize):
    """A kernel whose layout loses a code."""

    name = "forgetful"

    def codes(self, start, stop):
        codes, scale, zero = super().codes(start, stop)
        return Codes(codes.clone().index_fill_(0, torch.tensor([0]), 0), scale, zero)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Wrong, "wrong is 1 away"),
        (Broken, "broken fails: no such operator"),
        (Missing, "missing fails: .*_no_such_kernel"),
        (Forgetful, "does not give codes back"),
    ],
    ids=["product", "error", "missing", "layout"],
)
def test_a_kernel_that_disagrees_is_not_used_and_a_warning_says_so_once(monkeypatch, kind, says):
    monkeypatch.setattr(kernel_choice, "KERNELS", (kind,))
    monkeypatch.setattr(kernel_choice, "FAILED", set())
    messages = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    try:
        chosen = [fastest(Dequantize.from_codes(weight(4, seed=seed), 4)) for seed in range(2)]
    finally:
        logger.remove(sink)
    assert [kernel.name for kernel in chosen] == ["dequantize"] * 2
    assert len(messages) == 1
    assert re.search(says, messages[0])


@pytest.mark.parametrize(
    ("capability", "bits", "dtype", "taken"),
    [
        ((9, 0), 4, torch.bfloat16, True),
        ((8, 0), 4, torch.bfloat16, True),
        ((7, 5), 4, torch.bfloat16, False),
        ((9, 0), 3, torch.bfloat16, False),
        ((9, 0), 4, torch.float16, False),
    ],
    ids=["Hopper", "Ampere", "Turing", "3 bits", "float16"],
)
def test_which_weights_the_int4_kernel_of_a_gpu_takes(monkeypatch, capability, bits, dtype, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    shape = kernels.Shape(bits, 64, 256, 64, dtype, "cuda")
    assert [kind for kind in kernel_choice.KERNELS if kind.takes(shape)] == ([CudaInt4] if taken else [])


def test_a_gpu_whose_kernel_fails_goes_on_with_dense_products_and_says_so(monkeypatch):
    # Here no weight can lie on a GPU: the kernel is made to believe so, and torch refuses its operator.
    monkeypatch.setattr(CudaInt4, "takes", classmethod(lambda cls, shape: True))
    monkeypatch.setattr(kernel_choice, "KERNELS", (CudaInt4,))
    monkeypatch.setattr(kernel_choice, "FAILED", set())
    messages = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    layer = PackedLinear.from_codes(weight(4), QuantSpec(4, 64), 256)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = layer(x)
    logger.remove(sink)
    assert layer.kernel == "dequantize"
    assert relative(y, exact_product(x, weight(4), 4)) < 0.01
    assert "Kernel torch CUDA int4 fails" in messages[0]


def test_large_weights_are_dequantized_a_few_rows_at_a_time(monkeypatch):
    kernel = Dequantize.from_codes(weight(4, dtype=torch.float32), 4)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    whole = kernel.matmul(x)
    monkeypatch.setitem(kernels.BLOCK_ELEMENTS, "cpu", 7 * 256)
    torch.testing.assert_close(kernel.matmul(x), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "real zeros"])
@pytest.mark.parametrize("columns", [256, 1184, 4096])
def test_the_int4_kernel_of_a_gpu(columns, kind):
    codes = weight(4, rows=64, columns=columns, group_size=32, kind=kind)
    there = Dequantize.from_codes(codes, 4).to("cuda")
    kernel = fastest(there)
    assert isinstance(kernel, CudaInt4)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert relative(kernel.matmul(x.cuda()).cpu(), exact_product(x, codes, 4)) < 2**-7
    back = kernel.codes(0, 64)
    assert same([None if part is None else part.cpu() for part in back], codes)
