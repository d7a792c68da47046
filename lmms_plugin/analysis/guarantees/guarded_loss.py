"""What a guarantee promises to be rare; imports nothing that computes, since the command line names it."""

from enum import StrEnum


class GuardedLoss(StrEnum):
    """What is promised to be rare."""

    ERROR = "error"
    """Wrong answers among the accepted ones; of soft outcomes what they lack of 1."""
    IOU = "iou"
    """What the IoU of accepted boxes lacks of 1, on average."""
    FALSE_POSITIVE = "false-positive"
    """Accepted boxes for expressions that match nothing, among all such expressions."""
