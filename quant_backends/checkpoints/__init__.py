"""Checkpoints: loading, saving, and the formats of other tools."""
