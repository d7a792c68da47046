"""Confidence estimates of an answer from a model's outputs."""
