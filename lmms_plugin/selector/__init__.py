"""Selector: a confidence learned from a model's hidden states."""
