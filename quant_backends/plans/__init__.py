"""Plans and reports: what is to be quantized, at how many bits, and what was done."""
