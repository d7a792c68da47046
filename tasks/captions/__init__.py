"""Captions: documents, scores and YAML."""
