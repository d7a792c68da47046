"""Sources of datasets, and their reading."""
