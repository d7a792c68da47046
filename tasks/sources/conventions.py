"""Box conventions of datasets: order and scale are declared and checked, never guessed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_BETWEEN = re.compile(r"[\s,<>()\[\]{}]*")
_CORNER = 0.15
_ENOUGH = 24


@dataclass(frozen=True)
class Convention:
    """Box convention of a dataset.

    Attributes:
        order: `xyxy` for left, top, right, bottom; `xywh` for left, top, width, height.
        scale: None for pixels of the original image; else the number that stands for its full width and height: 1 for
            fractions, 100 or 1000 for hundredths or thousandths.
        flat: Whether a box may have zero width or height, as rounding to hundredths makes it. Such a box cannot be
            found.
    """

    order: Literal["xyxy", "xywh"]
    scale: float | None = None
    flat: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("xyxy", "xywh"):
            raise ValueError(f"expected the order xyxy or xywh, got {self.order!r}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"expected a scale above 0, or None for pixels, got {self.scale}")

    def __str__(self) -> str:
        names = "[x1, y1, x2, y2]" if self.order == "xyxy" else "[x, y, width, height]"
        return f"{names} in {'pixels' if self.scale is None else f'0 to {self.scale:g} of the image'}"

    def numbers(self, written: Any) -> list[float]:
        """Parse the four numbers of a box: a list of four, or a text that holds them.

        Raises:
            ValueError: There are not four finite numbers, or a side is negative or (unless `flat`) zero.
        """
        box = numbers_in(written)
        expected = f"expected a list of four numbers {self} of positive size, got {written!r}"
        if len(box) != 4 or not all(isinstance(value, int | float) and abs(value) < 1e6 for value in box):
            raise ValueError(expected)
        width, height = self._sides(box)
        if min(width, height) < 0 or (min(width, height) == 0 and not self.flat):
            raise ValueError(expected)
        return [float(value) for value in box]

    def pixels(self, box: Sequence[float], size: tuple[int, int]) -> list[float]:
        """Convert a box to left, top, width and height in pixels of the original image.

        Args:
            box: Box as `numbers` returns it.
            size: (width, height) of the original image in pixels.

        Raises:
            ValueError: The box leaves the image by more than rounding, lies wholly beside it, or is smaller than a
                pixel where pixels are declared, which indicates another order or scale. The message says which others
                would fit.
        """
        if not self._fits(box, size):
            others = [str(other) for other in _ALL if other._fits(box, size)]
            hint = f" (it would fit as {' or '.join(others)})" if others else ""
            raise ValueError(f"expected {self} inside the {size[0]}x{size[1]} image, got {list(box)}{hint}")
        return self._xywh(box, size)

    def reach(self, boxes: Iterable[tuple[Sequence[float], tuple[int, int]]]) -> None:
        """Check that boxes of several images do not all lie in one corner, as those of a finer scale would.

        Args:
            boxes: Box as `numbers` returns it, and size of its image in pixels, of some images.

        Raises:
            ValueError: None of two dozen boxes or more extends beyond 15 % of its image's width or height.
        """
        corners = []
        for box, size in boxes:
            x, y, width, height = self._xywh(box, size)
            corners.append(max((x + width) / size[0], (y + height) / size[1]))
        if len(corners) >= _ENOUGH and max(corners) < _CORNER:
            raise ValueError(
                f"expected {self}, but of {len(corners)} boxes none reaches beyond {max(corners):.2g} of its image: "
                "the scale is another"
            )

    def _sides(self, box: Sequence[float]) -> tuple[float, float]:
        return (box[2] - box[0], box[3] - box[1]) if self.order == "xyxy" else (box[2], box[3])

    def _xywh(self, box: Sequence[float], size: tuple[int, int]) -> list[float]:
        units = (1.0, 1.0) if self.scale is None else (size[0] / self.scale, size[1] / self.scale)
        width, height = self._sides(box)
        return [box[0] * units[0], box[1] * units[1], width * units[0], height * units[1]]

    def _fits(self, box: Sequence[float], size: tuple[int, int]) -> bool:
        x, y, width, height = self._xywh(box, size)
        slack = max(2.0, 0.01 * max(size))
        inside = min(x, y) >= -slack and x + width <= size[0] + slack and y + height <= size[1] + slack
        # What lies beside the image, be it by rounding, has no part that could be found.
        sides = (x, width, size[0]), (y, height, size[1])
        inside = inside and not any(length > 0 and not -length < start < edge for start, length, edge in sides)
        return inside and min(width, height) >= 0 and (self.scale is not None or self.flat or max(box) > 1)


_ALL = tuple(Convention(order, scale) for order in ("xyxy", "xywh") for scale in (None, 1.0, 1000.0))


def numbers_in(written: Any) -> Sequence[Any]:
    """Return a list as it is; for a text of brackets, commas and numbers, its numbers; else an empty list."""
    if isinstance(written, str):
        return [] if not _BETWEEN.fullmatch(_NUMBER.sub("", written)) else [float(n) for n in _NUMBER.findall(written)]
    return written if isinstance(written, Sequence) else []
