"""Logs of runs as columns of numbers, and metrics with intervals from them; needs no model and no terminal."""
