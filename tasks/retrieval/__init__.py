"""Retrieval of captions and photographs: documents, scores and YAML."""
