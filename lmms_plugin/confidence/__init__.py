"""Confidence of an answer from what a model tells with it."""
