"""Processes: start and end, output, and memory errors."""
