"""Corruptions of images that leave every object where it is."""
