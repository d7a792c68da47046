"""What lmms-eval asks of a model and what an engine answers."""
