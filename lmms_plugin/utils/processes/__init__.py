"""Processes that are started, found and ended, what they print, and what they say when memory runs out."""
