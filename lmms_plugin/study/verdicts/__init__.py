"""Analyses of a study: what its cells show together."""
