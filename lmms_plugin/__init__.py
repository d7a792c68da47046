"""Quantized vision-language models in lmms-eval: grounding and calibration under domain shift."""

__version__ = "0.2.0"

from lmms_plugin.utils import moved
from lmms_plugin.utils.processes.quiet import hush

hush()
moved.tell()
