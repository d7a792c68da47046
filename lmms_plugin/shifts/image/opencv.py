"""OpenCV, imported when one of its functions is first called: names of tasks are listed without it."""

from typing import Any


class _OpenCv:
    def __getattr__(self, name: str) -> Any:
        import cv2

        value = getattr(cv2, name)
        # Kept here, so that the next use finds it without coming by.
        setattr(self, name, value)
        return value


cv2 = _OpenCv()
