"""Freed memory: a process that keeps it does not ask the system for the same pages again and again."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of Linux's C library")

HELD = """
from pathlib import Path
import numpy as np
from lmms_plugin.utils.processes.freed_memory import give_back_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
several = [np.ones(6_000) for _ in range(2_000)]
kept = several[::100]
del several
before = resident()
give_back_freed_memory()
print(before - resident())
"""
FAULTS = """
import resource
import numpy as np
from lmms_plugin.utils.processes.freed_memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    several = [np.ones(60_000) for _ in range(8)]
    del several
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, kept):
    return int(subprocess.check_output([sys.executable, "-c", FAULTS.format(kept=kept)], text=True))


def test_pages_are_used_again():
    # Eight arrays of 480 kB have 940 pages.
    assert faults(kept=True) < 3000
    assert faults(kept=False) > 10 * faults(kept=True)


def test_what_is_freed_between_other_memory_goes_back():
    # 96 MB were made, and a hundredth is kept.
    assert int(subprocess.check_output([sys.executable, "-c", HELD], text=True)) > 60e6
