"""What floating point sums depend on besides their terms."""

from __future__ import annotations

import platform
from typing import Any

import torch


def arithmetic() -> dict[str, Any]:
    """Return what decides in which order a device adds: two runs where it is equal compute the same to the last bit."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"devices": devices, "processor": [platform.machine(), capability], "threads": torch.get_num_threads()}
