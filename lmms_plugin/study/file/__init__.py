"""What a study file asks, as checked values, and the keys of its cells."""
