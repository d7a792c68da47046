"""Parity of two engines: whether the same model gives the same answers in both, and if not, why."""
