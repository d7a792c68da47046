"""The `lmms-plugin` command: options, tables and displays; the only place that writes to a terminal."""

from typing import TYPE_CHECKING

from lmms_plugin.utils.moved import refusal

if not TYPE_CHECKING:
    __getattr__ = refusal(__name__)
