"""Referring expressions: datasets, scores and YAML."""
