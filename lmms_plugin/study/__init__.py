"""Studies: a grid of evaluation cells, run cell by cell, and the analysis of their results."""
