"""Methods: quantizers, one file each."""
