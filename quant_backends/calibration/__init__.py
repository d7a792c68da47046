"""Calibration: where inputs come from, and what is measured on them block by block."""

from typing import TYPE_CHECKING

from lmms_plugin.utils.moved import refusal

if not TYPE_CHECKING:
    __getattr__ = refusal(__name__)
