"""Image corruptions that leave every object in place."""
