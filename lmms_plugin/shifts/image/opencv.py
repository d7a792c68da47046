"""OpenCV, imported when one of its functions is first called: names of tasks are listed without it."""

from typing import Any


def __getattr__(name: str) -> Any:
    import cv2

    # Kept here, so that the next use finds it without coming by.
    value = globals()[name] = getattr(cv2, name)
    return value
