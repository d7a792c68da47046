"""The study file as validated values, and the keys of its cells."""
