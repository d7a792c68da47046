"""A study's folder and its shared storage."""
