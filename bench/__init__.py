"""Measurements of this package, each a module to run: `python -m bench.<name> [--json FILE]`."""
