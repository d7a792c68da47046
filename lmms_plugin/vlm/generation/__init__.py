"""Answers token by token, with what is kept of the model's states and probabilities."""
