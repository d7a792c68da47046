"""Whether an unquantized model reaches the numbers that were published for it."""
