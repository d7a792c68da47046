"""Packed linear layers and their kernels."""
