"""Dense 16-bit layers in float32 where the processor has no 16-bit arithmetic."""

import pytest
import torch
from torch import nn

from lmms_plugin.quant_backends.layers import wide_products
from lmms_plugin.quant_backends.layers.wide_products import WideProducts


@pytest.fixture
def emulated(monkeypatch):
    """A processor that emulates 16 bits."""
    monkeypatch.setattr(wide_products, "arithmetic_dtype", lambda dtype, device: torch.float32)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_the_product_is_that_of_float32_rounded_once(monkeypatch, dtype, bias):
    monkeypatch.setattr(wide_products, "rows_per_block", lambda columns: 7)
    layer = nn.Linear(96, 40, bias=bias).to(dtype)
    x = torch.randn(2, 5, 96).to(dtype)
    with WideProducts():
        y = layer(x)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps * exact.abs() / 2
    assert ((y.double() - exact).abs() <= step + 1e-5).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_go_through_frozen_layers_as_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(wide_products, "rows_per_block", lambda columns: 7)
    layer = nn.Linear(96, 40).to(dtype).requires_grad_(requires_grad=False)
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    gradient = torch.randn(2, 5, 40).to(dtype)
    with WideProducts():
        layer(x).backward(gradient)
    exact = gradient.double() @ layer.weight.double()
    step = torch.finfo(dtype).eps * exact.abs() / 2
    assert ((x.grad.double() - exact).abs() <= step + 1e-5).all()


@pytest.mark.usefixtures("emulated")
def test_weights_that_want_gradients_get_them(monkeypatch):
    monkeypatch.setattr(wide_products, "WideLinear", None)
    layer = nn.Linear(8, 4).bfloat16()
    with WideProducts():
        layer(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_float32_and_processors_with_16_bit_arithmetic_are_left_alone(monkeypatch):
    monkeypatch.setattr(wide_products, "WideLinear", None)
    x = torch.randn(3, 8)
    layer = nn.Linear(8, 4)
    with WideProducts():
        wide = layer(x)
    assert torch.equal(wide, layer(x))
    monkeypatch.setattr(wide_products, "arithmetic_dtype", lambda dtype, device: dtype)
    with WideProducts():
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
