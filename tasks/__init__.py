"""Tasks that this package adds to lmms-eval: Python modules beside folders of YAML."""
