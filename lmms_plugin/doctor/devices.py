"""Checks of devices, and of the kernels of packed layers on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as functional

from lmms_plugin.doctor.rows import DiagnosisRow, ok, warn
from lmms_plugin.quant_backends.layers.kernel_choice import AGREEMENT, KERNELS, attempt
from lmms_plugin.quant_backends.layers.kernels import Dequantize, Kernel, arithmetic_dtype, default_dtype
from lmms_plugin.quant_backends.layers.wide_products import WideProducts
from lmms_plugin.quant_backends.methods.rtn_grid import round_to_nearest
from lmms_plugin.quant_backends.plans.plan import QuantSpec

_DRIVER = Path("/proc/driver/nvidia/version")
_ROWS, _COLUMNS, _GROUP = 64, 256, 128
_GIB = 1 << 30


def check_gpus() -> Iterator[DiagnosisRow]:
    """Report the devices that models compute on."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        why = "; ".join(str(one.message) for one in said)
        if _DRIVER.exists():
            yield warn(
                "gpu",
                f"there is an NVIDIA driver, but torch {torch.__version__} finds no GPU {why}",
                "see CUDA_VISIBLE_DEVICES, and that torch's CUDA version is one of this driver (nvidia-smi)",
            )
        else:
            yield ok("gpu", "none; models compute on the CPU")
    for number in range(torch.cuda.device_count() if there else 0):
        one = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        yield ok(
            "gpu",
            f"cuda:{number}: {one.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} free, "
            f"compute capability {one.major}.{one.minor}",
        )
    yield from _dtypes("cuda" if there else "cpu")


def _dtypes(device: str) -> Iterator[DiagnosisRow]:
    dtype = default_dtype(device)
    used = f"models compute in {_name(dtype)} unless --model_args dtype= says otherwise"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield warn("dtype", f"{used}, which this GPU emulates", "add dtype=float16 to --model_args")
    else:
        yield ok("dtype", used)


def check_kernels() -> Iterator[DiagnosisRow]:
    """Compare every kernel that supports a small layer here with the dense product."""
    yield from _kernels("cpu")
    models: dict[str, int] = {}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        models.setdefault(torch.cuda.get_device_name(number), number)
    for number in models.values():
        with torch.cuda.device(number):
            yield from _kernels(f"cuda:{number}")
    yield from _wide()


def _kernels(device: str) -> Iterator[DiagnosisRow]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(_ROWS, _COLUMNS, generator=generator).to(device)
    any_kernel = False
    for kind in KERNELS:
        right, faults = _tried(kind, dense)
        any_kernel |= bool(right)
        if right:
            widths = ", ".join(map(str, right))
            yield ok("kernels", f"{device}: {kind.name} gives the dense product in bfloat16 for bits {widths}")
        for fault, bits in faults.items():
            widths = ", ".join(map(str, bits))
            yield warn(
                "kernels", f"{device}: {kind.name} {fault} for bits {widths}; such layers are made dense instead"
            )
    if not any_kernel:
        yield ok("kernels", f"{device}: none; weights are made dense for each product, which costs time")


def _tried(kind: type[Kernel], dense: torch.Tensor) -> tuple[list[int], dict[str, list[int]]]:
    """Return the bits for which a kernel is correct, and errors by bits; both empty where the kernel is unavailable."""
    right: list[int] = []
    faults: dict[str, list[int]] = {}
    for bits in range(2, 9):
        weight = Dequantize.from_codes(round_to_nearest(dense, QuantSpec(bits, _GROUP), torch.bfloat16), bits)
        if kind.takes(weight.shape):
            _, fault = attempt(kind, weight)
            if fault is None:
                right.append(bits)
            else:
                faults.setdefault(fault, []).append(bits)
    return right, faults


def _wide() -> Iterator[DiagnosisRow]:
    wide = arithmetic_dtype(torch.bfloat16, "cpu")
    if wide == torch.bfloat16:
        yield ok("kernels", "cpu: the processor multiplies bfloat16 itself")
        return
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, _COLUMNS, generator=generator).bfloat16() for n in (5, _ROWS))
    with torch.no_grad(), WideProducts():
        product = functional.linear(x, weight)
    exact = x.double() @ weight.double().T
    difference = float((product.double() - exact).norm() / exact.norm())
    if difference <= AGREEMENT:
        yield ok("kernels", f"cpu: products of bfloat16 are computed in {_name(wide)}, which the processor does faster")
    else:
        yield warn("kernels", f"cpu: products of bfloat16 in {_name(wide)} are {difference:.2g} away from exact ones")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
