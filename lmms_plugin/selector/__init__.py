"""A learned confidence, and what it looks at."""
