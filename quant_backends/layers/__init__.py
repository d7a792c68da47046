"""Layers: packed linear layers and their matrix-product kernels."""
