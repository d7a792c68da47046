"""Interfaces: requests from lmms-eval and answers from an engine."""
