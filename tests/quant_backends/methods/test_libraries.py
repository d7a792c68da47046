"""quanto, bitsandbytes, torchao and hqq: the weights of the libraries' own layers, in layers whose bytes are true."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.layers.kernels import FEW_ROWS
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = [
    ("quanto", {}, 8),
    ("quanto", {}, 4),
    ("quanto", {}, 2),
    ("bitsandbytes", {"format": "nf4"}, 4),
    ("bitsandbytes", {"format": "fp4"}, 4),
    ("bitsandbytes", {"double_quant": True}, 4),
    ("bitsandbytes", {}, 8),
    ("bitsandbytes", {"outlier_threshold": 0.0}, 8),
    ("torchao", {}, 8),
    ("torchao", {}, 4),
    ("torchao", {"solver": "hqq"}, 4),
]
IDS = [f"{name}-{bits}{''.join(f'-{value}' for value in options.values())}" for name, options, bits in METHODS]


def weight(rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


@torch.no_grad()
def quantize(name, options, dense, spec, bias=None):
    pytest.importorskip({"quanto": "optimum.quanto"}.get(name, name))
    backend = get(name, **options)
    backend.check(QuantPlan(language=spec))
    return backend.quantize_linear(dense, None if bias is None else nn.Parameter(bias, requires_grad=False), spec)


@pytest.mark.parametrize(("name", "options", "bits"), METHODS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256, 512), (64, 300), (48, 64)], ids=str)
def test_forward_multiplies_with_the_weight_that_the_layer_says_it_holds(name, options, bits, dtype, shape):
    """At widths that groups divide and do not divide, with a row of zeros, for one input row and for many."""
    dense, bias = weight(*shape, dtype), weight(1, shape[0], dtype)[0]
    dense[3] = 0
    layer = quantize(name, options, dense, QuantSpec(bits, 32), bias)
    held = layer.weight
    assert held.shape == shape
    assert held.dtype == dtype
    assert torch.equal(held[3], torch.zeros(shape[1], dtype=dtype))
    for x in (weight(1, shape[1], dtype, 1) * 50, weight(24, shape[1], dtype, 2).view(2, 12, -1) * 50):
        got, expected = layer(x), functional.linear(x.float(), held.float(), bias.float())
        assert got.dtype == dtype
        assert got.shape == expected.shape
        # LLM.int8() rounds inputs to 8 bits too.
        tolerance = 0.01 if layer.kernel.startswith("bitsandbytes LLM") else 0.006
        assert (got.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("name", "options", "bits"), METHODS, ids=IDS)
def test_bytes_are_those_of_every_tensor_and_below_the_dense_ones(name, options, bits):
    dense = weight(256, 512, torch.bfloat16)
    layer = quantize(name, options, dense, QuantSpec(bits, 64))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.state_dict().values()}
    assert layer.weight_bytes == sum(storages.values())
    assert dense.numel() * bits / 8 < layer.weight_bytes < dense.numel() * (bits + 1) / 8
    assert layer.bits == bits


@pytest.mark.parametrize(("name", "options", "bits"), METHODS, ids=IDS)
def test_error_falls_with_the_group_size_and_with_bits(name, options, bits):
    dense = weight(64, 512)
    errors = [(quantize(name, options, dense, QuantSpec(bits, g)).weight - dense).norm() for g in (32, 128)]
    assert errors[0] <= errors[1] * 1.0001
    if bits < 8:
        assert (quantize(name, options, dense, QuantSpec(8, 32)).weight - dense).norm() < errors[0] / 4


@pytest.mark.parametrize(("name", "options", "bits"), METHODS, ids=IDS)
def test_rows_copies_and_state(name, options, bits):
    """Rows in blocks are those of the whole weight; a copy and a layer that loads the state compute the same."""
    dense, x = weight(64, 256), weight(5, 256, seed=1)
    layer, other = (quantize(name, options, w, QuantSpec(bits, 64)) for w in (dense, weight(64, 256, seed=7)))
    whole = layer.weight
    assert torch.equal(torch.cat([layer.dense_rows(start, start + 20) for start in (0, 20, 40)])[:60], whole[:60])
    assert torch.equal(layer.dense_rows(60, 64), whole[60:])
    expected = layer(x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    other.load_state_dict({key: value.clone() for key, value in layer.state_dict().items()}, assign=True)
    assert torch.equal(other(x), expected)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    assert not {t.data_ptr() for t in twin.buffers()} & {t.data_ptr() for t in layer.buffers()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quanto_is_the_library_at_widths_that_its_own_group_size_divides(bits, dtype):
    from optimum.quanto import freeze, qint2, qint4, qint8
    from optimum.quanto import quantize as library

    dense = weight(128, 512, dtype)
    model = nn.Sequential(nn.Linear(512, 128, bias=False, dtype=dtype))
    model[0].weight.data = dense.clone()
    library(model, weights={8: qint8, 4: qint4, 2: qint2}[bits])
    freeze(model)
    ours = quantize("quanto", {}, dense, QuantSpec(bits, 128))
    assert torch.equal(ours.weight, model[0].weight.dequantize())
    x = weight(7, 512, dtype, seed=3)
    assert torch.equal(ours(x), model(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "options"), [(4, {"format": "nf4"}), (4, {"format": "fp4"}), (8, {})], ids=str)
def test_bitsandbytes_is_the_library(bits, options, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    dense, x = weight(96, 320, dtype), weight(6, 320, dtype, 1) * 100
    if bits == 4:
        theirs = bnb.nn.Linear4bit(320, 96, bias=False, compute_dtype=dtype, quant_type=options["format"])
        theirs.weight = bnb.nn.Params4bit(dense.clone(), quant_type=options["format"], compress_statistics=False)
        spec = QuantSpec(4, 64)
    else:
        theirs = bnb.nn.Linear8bitLt(320, 96, bias=False, has_fp16_weights=False, threshold=6.0)
        theirs.weight = bnb.nn.Int8Params(dense.clone(), requires_grad=False, has_fp16_weights=False)
        spec = QuantSpec(8, 64)
    theirs = theirs.to("cpu").eval()
    # With avx512_bf16 the library's layer would multiply in bfloat16, whatever its compute_dtype.
    theirs.support_avx512bf16_for_cpu = False
    ours = quantize("bitsandbytes", options, dense, spec)
    with torch.no_grad():
        # More rows are widened to float32 where the processor has no 16-bit arithmetic.
        assert torch.equal(ours(x[:FEW_ROWS]), theirs(x[:FEW_ROWS]))
        torch.testing.assert_close(ours(x), theirs(x), rtol=2 * torch.finfo(dtype).eps, atol=2e-3)


NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""The sixteen values of the QLoRA paper (arXiv 2305.14314, appendix E)."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 128, 1024])
@pytest.mark.parametrize("shape", [(96, 320), (48, 64), (64, 300), (33, 70), (5, 48), (6, 4304)], ids=str)
def test_nf4_weights_are_those_of_the_paper_where_blocks_cross_rows_too(shape, group_size, dtype):
    """bitsandbytes' own AVX-512 code takes scales of other blocks there, and products with them."""
    dense, x = weight(*shape, dtype), weight(7, shape[1], dtype, 1) * 50
    blocks = functional.pad(dense.float().flatten(), (0, -dense.numel() % group_size)).view(-1, group_size)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = (blocks / scales).unsqueeze(-1).sub(table).abs().argmin(dim=-1)
    expected = (table[nearest] * scales).flatten()[: dense.numel()].view(shape)
    layer = quantize("bitsandbytes", {}, dense, QuantSpec(4, group_size))
    # Where a weight lies halfway between two values, either is right.
    assert (layer.weight != expected.to(dtype)).float().mean() < 1e-3
    product = functional.linear(x.float(), expected)
    assert (layer(x).float() - product).norm() < 4 * torch.finfo(dtype).eps * product.norm()


@pytest.mark.parametrize(("name", "options", "bits"), METHODS, ids=IDS)
def test_a_forward_pass_leaves_what_is_stored_alone(name, options, bits):
    layer = quantize(name, options, weight(96, 320), QuantSpec(bits, 64))
    before, held = {key: value.clone() for key, value in layer.state_dict().items()}, layer.weight
    layer.eval()(weight(5, 320, seed=1))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].dtype is value.dtype and torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(layer.weight, held)


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_is_the_library(bits):
    pytest.importorskip("torchao")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    dense, x = weight(128, 512, torch.bfloat16), weight(6, 512, torch.bfloat16, 1)
    theirs = nn.Linear(512, 128, bias=False, dtype=torch.bfloat16)
    theirs.weight.data = dense.clone()
    config = {8: Int8WeightOnlyConfig(granularity=PerGroup(64)), 4: PrototypeInt4WeightOnlyConfig(group_size=64)}
    quantize_(theirs, config[bits])
    with torch.no_grad():
        assert torch.equal(quantize("torchao", {}, dense, QuantSpec(bits, 64))(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_hqq_equals_the_librarys_dequantized_weights(bits, dtype):
    """The same solver, codes in the packed layer: bit for bit in the dtype that the layer computes in."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(384, 96, bias=True, dtype=dtype)
    linear.weight.data = weight(96, 384, dtype)
    dense = linear.weight.data.clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    config["weight_quant_params"]["round_zero"] = True
    theirs = HQQLinear(copy.deepcopy(linear), config, compute_dtype=dtype, device="cpu")
    ours = get("hqq").quantize_linear(dense, linear.bias, QuantSpec(bits, 64))
    assert torch.equal(ours.weight, theirs.dequantize())
    x = weight(5, 384, dtype, 1)
    tolerance = 1e-5 if dtype is torch.float32 else 0.01
    assert (ours(x) - theirs(x)).norm() <= tolerance * theirs(x).norm()


def test_quanto_int8_survives_widths_that_crash_torchs_kernel():
    """torch's int8 product for bfloat16 reads out of bounds unless 16 divides the width (3420 in Qwen2.5-VL)."""
    layer = quantize("quanto", {}, weight(64, 3420, torch.bfloat16), QuantSpec(8, 128))
    assert (layer.padded_columns, layer.group_size) == (4, 3420)
    x = weight(20, 3420, torch.bfloat16, 1)
    expected = functional.linear(x.float(), layer.weight.float())
    assert (layer(x).float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("name", "options", "spec", "reason"),
    [
        ("quanto", {}, QuantSpec(3), "quanto cannot quantize to 3 bits"),
        ("quanto", {}, QuantSpec(4, 64, symmetric=True), "zero point per group"),
        ("bitsandbytes", {}, QuantSpec(3), "bitsandbytes cannot quantize to 3 bits"),
        ("bitsandbytes", {}, QuantSpec(4, 48), "blocks have 32, 64, .* got group_size=48"),
        ("bitsandbytes", {}, QuantSpec(4, None), "blocks have"),
        ("torchao", {}, QuantSpec(2), "3|2-bit weights in whole bytes, which saves nothing"),
        ("torchao", {}, QuantSpec(4, None), "groups of 32, 64, 128, got None"),
        ("torchao", {}, QuantSpec(4, 48), "groups of 32, 64, 128, got 48"),
        ("torchao", {}, QuantSpec(4, 64, symmetric=True), "zero point per group"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_library_cannot_do_is_refused_with_the_reason(name, options, spec, reason):
    with pytest.raises(ValueError, match=reason):
        get(name, **options).check(QuantPlan(language=spec))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("bitsandbytes", {"format": "nf5"}, "format must be one of nf4, fp4"),
        ("bitsandbytes", {"outlier_threshold": -1.0}, "must be 0 or above"),
        ("torchao", {"solver": "best"}, "solver must be one of"),
        ("quanto", {"format": "nf4"}, "unknown option 'format' .*'quanto'"),
    ],
    ids=["format", "threshold", "solver", "no option"],
)
def test_bad_options_are_refused(name, options, reason):
    with pytest.raises(ValueError, match=reason):
        get(name, **options)


def test_torchao_says_which_rows_its_int4_kernel_takes():
    with pytest.raises(ValueError, match="multiples of 16, got a layer of 24"):
        quantize("torchao", {}, weight(24, 64), QuantSpec(4, 32))


def test_torchao_never_leaves_a_layer_dense(monkeypatch):
    """Should the library skip a layer, as it does where a group does not divide the width, that is an error."""
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(torchao, "quantize_", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="torchao left a layer of 32 x 64 dense"):
        quantize("torchao", {}, weight(32, 64), QuantSpec(4, 32))


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_a_missing_extra_gives_the_install_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for module in [module for module in sys.modules if module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=rf'quant_{name} needs {name}.*pip install "lmms-plugin\[{name}\]"'):
        get(name).check(QuantPlan(language=QuantSpec(4)))


def test_quanto_without_a_compiler_says_what_it_needs(monkeypatch):
    from lmms_plugin.quant_backends.methods import quanto

    def fail(*_):
        raise RuntimeError("Error building extension 'quanto_cpp'")

    quanto.expect_unpacking.cache_clear()
    monkeypatch.setattr(torch.ops.quanto, "unpack", fail)
    try:
        with pytest.raises(RuntimeError, match=r"C\+\+ compiler \(g\+\+\), ninja and write access.*bits=8"):
            quantize("quanto", {}, weight(32, 64), QuantSpec(4, 32))
        assert quantize("quanto", {}, weight(32, 64), QuantSpec(8, 32)).bits == 8
    finally:
        quanto.expect_unpacking.cache_clear()


def test_listing_backends_imports_no_library():
    heavy = "torch hqq optimum bitsandbytes torchao auto_round transformers"
    script = f"""
import sys
from lmms_plugin.quant_backends import names
assert {{"quanto", "bitsandbytes", "torchao", "prequantized"}} <= set(names())
print([name for name in {heavy.split()} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "options", "bits"), METHODS, ids=IDS)
def test_on_the_gpu_the_kernel_multiplies_with_the_weight_that_the_layer_holds(name, options, bits):
    dense, bias = weight(256, 1152, torch.bfloat16).cuda(), weight(1, 256, torch.bfloat16)[0].cuda()
    layer = quantize(name, options, dense, QuantSpec(bits, 128), bias)
    assert {tensor.device.type for tensor in layer.buffers()} == {"cuda"}
    held = layer.weight
    assert (held - dense).norm() < 4 / 2**bits * dense.norm()
    for rows in (1, 40):
        x = weight(rows, 1152, torch.bfloat16, rows).cuda() * 50
        expected = functional.linear(x.float(), held.float(), bias.float())
        assert (layer(x).float() - expected).norm() < 0.02 * expected.norm()
