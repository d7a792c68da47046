"""Confidence of an answer from what a model tells with it."""

from typing import TYPE_CHECKING

from lmms_plugin.utils.moved import refusal

if not TYPE_CHECKING:
    __getattr__ = refusal(__name__)
