"""Studies: a grid of questions, run cell by cell, and what its answers say together."""
