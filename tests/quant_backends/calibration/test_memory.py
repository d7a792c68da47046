"""Peaks of memory on a GPU."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_can_be_reset_before_anything_lies_on_the_device():
    # A process of its own: here other tests may have touched the device.
    script = """
import torch
from lmms_plugin.quant_backends.calibration.memory import read_peak, reset_peak
reset_peak()
x = torch.zeros(1 << 20, device="cuda")
assert read_peak().bytes >= 4 << 20
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
