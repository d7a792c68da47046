"""Calibration: where inputs come from, and what is measured on them block by block."""
