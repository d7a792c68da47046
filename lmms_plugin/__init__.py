"""Quantized vision-language models in lmms-eval: grounding and calibration under domain shift."""

__version__ = "0.1.0"

from lmms_plugin.utils.processes.quiet import hush

hush()
