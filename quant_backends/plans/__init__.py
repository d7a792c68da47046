"""What is quantized, how finely, and what became of it."""
