"""Captions: documents, scores and YAML."""

from typing import TYPE_CHECKING

from lmms_plugin.utils.moved import refusal

if not TYPE_CHECKING:
    __getattr__ = refusal(__name__)
