"""Calibration: the sources of inputs, and the statistics gathered on them block by block."""

from typing import TYPE_CHECKING

from lmms_plugin.utils.moved import refusal

if not TYPE_CHECKING:
    __getattr__ = refusal(__name__)
