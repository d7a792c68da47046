"""Calibration: the sources of inputs, and the statistics gathered on them block by block."""
