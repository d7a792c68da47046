"""Tasks this package adds to lmms-eval: Python beside plain YAML folders."""
