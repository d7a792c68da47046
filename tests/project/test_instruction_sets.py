"""The same images and the same quantized weights on processors with other instruction sets.

Libraries choose code by processor. Their own switches make them choose that of an older one; docs/determinism.md says
how to run any test that way. bitsandbytes has no switch: `quant_backends/methods/test_libraries.py` compares its
weights with the paper's.
"""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX2,FMA3,FP16,AVX",
    "OPENCV_IPP": "sse42",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-AVX",
}
"""What makes torch, oneDNN, MKL, numpy, OpenCV and the C library take the code for a processor of 2008."""

ROUNDED = ("defocus_blur", "centred_motion_blur", "gaussian_blur", "centred_glass_blur", "frost", "fog")
"""Corruptions that OpenCV sums in floating point, in the order that its code for the processor has."""

SHIFTS = """
import sys, numpy as np, skimage.data
from PIL import Image
from lmms_plugin.shifts.image.corruptions import SHIFTS, apply
image = Image.fromarray(skimage.data.astronaut()).resize((192, 160))
np.savez(sys.argv[1], **{f"{n} {s}": np.asarray(apply(image, n, s, "key")) for n in SHIFTS for s in (1, 3, 5)})
"""

WEIGHTS = """
import sys, numpy as np, torch
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.plans.plan import QuantSpec
random = torch.Generator().manual_seed(0)
dense, x = torch.randn(96, 320, generator=random) * 0.02, torch.randn(7, 320, generator=random)
made = {}
for method, bits in (("rtn", 4), ("rtn", 8), ("hqq", 3), ("hqq", 8), ("ptqtp", None)):
    backend = get(method)
    layer = backend.quantize_linear(dense, None, QuantSpec(bits or backend.default_bits, 64))
    made |= {f"{method} {bits} weight": layer.weight.numpy(), f"{method} {bits} product": layer(x).detach().numpy()}
np.savez(sys.argv[1], **made)
"""


@pytest.fixture(scope="module", params=[SHIFTS, WEIGHTS], ids=["shifts", "weights"])
def pair(request, tmp_path_factory):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the switches are those of x86 processors")
    folder = tmp_path_factory.mktemp("processors")
    for name, switches in (("new", {}), ("old", OLD)):
        command = [sys.executable, "-P", "-c", request.param, str(folder / f"{name}.npz")]
        subprocess.run(command, env=os.environ | switches, check=True)
    return request.param, np.load(folder / "new.npz"), np.load(folder / "old.npz")


@pytest.mark.slow
def test_the_same_on_a_processor_without_avx(pair):
    what, new, old = pair
    assert set(new) == set(old)
    for key in new:
        name = key.split()[0]
        if what is SHIFTS and name not in ROUNDED:
            assert np.array_equal(new[key], old[key]), key
        elif what is SHIFTS:
            # Floored sums that are whole numbers but for rounding, as in plain areas, are off by 1.
            difference = np.abs(new[key].astype(int) - old[key].astype(int))
            assert difference.max() <= 1, key
            assert (difference > 0).mean() < 0.03, key
        else:
            # Scales differ in float32's last digit (a fused product and sum rounds once, not twice), and then a weight
            # halfway between two codes may take the other one: few do, and none of the rest moves.
            difference, size = np.abs(new[key] - old[key]), np.abs(old[key]).max()
            assert np.linalg.norm(difference) <= 1e-3 * np.linalg.norm(old[key]), key
            if "weight" in key:
                assert (difference > 1e-6 * size).mean() < 1e-3, key
