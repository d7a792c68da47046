"""Number formats of quantized tensors as data (`entries`), and the one place that encodes and decodes them."""
