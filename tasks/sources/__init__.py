"""Where datasets come from and how they are read."""
