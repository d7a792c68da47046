"""Logs of runs as columns of numbers, and what is measured of them with intervals; no model, no page, no terminal."""
