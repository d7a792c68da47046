"""Lazy import of OpenCV at the first call of one of its functions: listing names of tasks does without it."""

from typing import Any


class _OpenCv:
    def __getattr__(self, name: str) -> Any:
        import cv2

        value = getattr(cv2, name)
        # Stored here, so that the next use does not come through this function.
        setattr(self, name, value)
        return value


cv2 = _OpenCv()
