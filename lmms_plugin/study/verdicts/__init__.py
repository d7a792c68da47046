"""What the cells of a study say together."""
