"""Shifts of images: corruptions that leave every object in place, and shifts that move boxes."""
