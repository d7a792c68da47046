"""Quantized key-value caches: which tokens are quantized when, how, and what a cache then takes."""
