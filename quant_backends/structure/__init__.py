"""The parts of a model, found by structure."""
