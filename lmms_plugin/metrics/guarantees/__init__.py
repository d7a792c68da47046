"""Guarantees for finite samples of images: thresholds, margins of boxes and bounds, with a stated probability."""
