"""Rotation of a model's residual stream, values and inputs before quantization (QuaRot, arXiv:2404.00456)."""
