"""What images are weighted by; imports nothing that computes, since the command line names it."""

from enum import StrEnum


class Covariate(StrEnum):
    """What images are weighted by, where a threshold is to stand for other images."""

    FEATURES = "features"
    """What the model held in mind when it answered, of runs with `features=DIR`."""
    CONFIDENCES = "confidences"
    """All logged confidences."""
