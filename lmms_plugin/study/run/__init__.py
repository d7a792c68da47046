"""Cells planned, run and recorded."""
