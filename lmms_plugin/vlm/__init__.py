"""Models that lmms-eval runs."""
