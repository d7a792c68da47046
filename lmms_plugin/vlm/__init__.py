"""The models that lmms-eval runs."""
