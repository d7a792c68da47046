"""Procedural textures for the weather shifts: plasma clouds for fog, ice on a window for frost."""

# OpenCV ships no types here and numpy types much arithmetic as Any.
# mypy: disable-error-code="no-any-return"

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmms_plugin.shifts.image.opencv import cv2

Field = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> Field:
    """Returns a diamond-square fractal on a torus, (height, width) in [0, 1].

    A strip is as coarse and as rough along its longer side as a square of that side, without the square's memory. It
    follows Fournier, Fussell & Carpenter (1982) as parametrised by Hendrycks & Dietterich (2019): the random
    displacement is uniform in ±a², and a falls from 100 by `decay` with every halving of the grid.

    Args:
        height: In pixels, a power of two, at least 2.
        width: Likewise.
        decay: Above 1; smaller means rougher.
        rng: Source of height · width - 1 uniform draws for a square, of less than twice as many for a strip.
    """
    grid = np.zeros((1, 1), np.float32)
    amplitude = 100.0
    cell = max(height, width)
    while cell > 1:
        cell //= 2
        grid = refine(grid, amplitude**2, rng)[: max(1, height // cell), : max(1, width // cell)]
        amplitude /= decay
    grid -= grid.min()
    return grid / grid.max()


def refine(corners: Field, amplitude: float, rng: np.random.Generator) -> Field:
    """One diamond-square step on a torus: (n, m) → (2n, 2m)."""
    n, m = corners.shape
    wobble = rng.random((3, n, m), dtype=np.float32)
    wobble -= 0.5
    wobble *= 2 * amplitude
    right, down = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
    centres = (corners + right + down + np.roll(right, -1, axis=0)) / 4 + wobble[0]
    fine = np.empty((2 * n, 2 * m), np.float32)
    fine[0::2, 0::2] = corners
    fine[1::2, 1::2] = centres
    fine[0::2, 1::2] = (corners + right + centres + np.roll(centres, 1, axis=0)) / 4 + wobble[1]
    fine[1::2, 0::2] = (corners + down + centres + np.roll(centres, 1, axis=1)) / 4 + wobble[2]
    return fine


class Ice(NamedTuple):
    """Look of one frosted window.

    Attributes:
        colour: Mean RGB.
        spread: Standard deviation of the grey value.
        seeds: How many points the ice grew from; each throws a fan of feathers.
        length: Median length of a feather, pixels.
        splay: Angle between a feather's spine and its needles, radians.
        cloud: Share of the slow changes of thickness in the relief, in [0, 1].
    """

    colour: tuple[float, float, float]
    spread: float
    seeds: int
    length: float
    splay: float
    cloud: float


# Means and spreads are those of the five photographs that Hendrycks & Dietterich's frost draws from (two of the five
# are one file), so that brightness and contrast lost to frost stay comparable; the ice itself is drawn here.
WINDOWS = (
    Ice(colour=(78, 149, 166), spread=17, seeds=50, length=150, splay=0.3, cloud=0.6),
    Ice(colour=(201, 205, 215), spread=22, seeds=150, length=100, splay=0.25, cloud=0.4),
    Ice(colour=(201, 205, 215), spread=22, seeds=90, length=150, splay=0.35, cloud=0.3),
    Ice(colour=(138, 153, 165), spread=28, seeds=330, length=40, splay=0.7, cloud=0.5),
    Ice(colour=(112, 123, 135), spread=43, seeds=190, length=70, splay=0.8, cloud=0.4),
)
ICE_HEIGHT, ICE_WIDTH = 576, 768
_NEEDLE_SPACING = 3.5
_SHADES = (-30, 0, 45, 80)
_SHIFT = 4


@lru_cache(maxsize=len(WINDOWS))
def ice(window: int) -> Pixels:
    """Returns the texture of one of `WINDOWS`, (576, 768, 3) RGB; the same in every process. Do not write to it."""
    look = WINDOWS[window]
    rng = np.random.Generator(np.random.PCG64(window))
    crystals, cloud, grain = _crystals(look, rng), _cloud(rng), _grain(rng)
    relief = (1 - look.cloud) * _standard(crystals) + look.cloud * _standard(cloud) + 0.35 * _standard(grain)
    relief = look.spread * _standard(relief)
    texture = np.clip(relief[..., None] + np.array(look.colour, np.float32), 0, 255).astype(np.uint8)
    texture.flags.writeable = False
    return texture


def ice_crop(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """Returns a random piece of a random frosted window, (height, width, 3) RGB.

    A canvas that the texture does not cover with a tenth to spare gets the texture enlarged, as in the original.
    """
    texture = ice(int(rng.integers(len(WINDOWS))))
    scale = max(1.0, 1.1 * height / ICE_HEIGHT, 1.1 * width / ICE_WIDTH)
    rows, columns = math.ceil(height / scale), math.ceil(width / scale)
    top = int(rng.integers(ICE_HEIGHT - rows + 1))
    left = int(rng.integers(ICE_WIDTH - columns + 1))
    piece = texture[top : top + rows, left : left + columns]
    return piece if scale == 1 else cv2.resize(piece, (width, height), interpolation=cv2.INTER_CUBIC)


def _standard(field: Field) -> Field:
    return (field - field.mean()) / field.std()


def _cloud(rng: np.random.Generator) -> Field:
    """Slow variation of the ice's thickness, (ICE_HEIGHT, ICE_WIDTH)."""
    return plasma(1024, 1024, 1.7, rng)[:ICE_HEIGHT, :ICE_WIDTH]


def _grain(rng: np.random.Generator) -> Field:
    """The rough skin of the ice, (ICE_HEIGHT, ICE_WIDTH)."""
    return cv2.GaussianBlur(rng.standard_normal((ICE_HEIGHT, ICE_WIDTH), dtype=np.float32), (0, 0), 1.2)


def _crystals(look: Ice, rng: np.random.Generator) -> Field:
    """Fans of feathers painted over each other and lit from the upper left, (ICE_HEIGHT, ICE_WIDTH)."""
    canvas = np.full((ICE_HEIGHT, ICE_WIDTH), 90, np.uint8)
    for _ in range(look.seeds):
        seed, heading = rng.uniform((0, 0), (ICE_WIDTH, ICE_HEIGHT)), rng.uniform(0, 2 * math.pi)
        for turn in rng.normal(0, 0.9, rng.integers(2, 7)):
            _paint_feather(canvas, seed, heading + turn, look, rng)
    height = canvas.astype(np.float32)
    light = height - np.roll(height, (2, 2), axis=(0, 1))
    return cv2.GaussianBlur(height + 0.7 * light, (3, 3), 0)


def _paint_feather(canvas: Pixels, seed: Points, heading: float, look: Ice, rng: np.random.Generator) -> None:
    """A spine with needles on both sides, longest a third of the way up, each needle of its own brightness."""
    length = look.length * rng.lognormal(0, 0.4)
    count = max(4, int(length / _NEEDLE_SPACING))
    along = np.linspace(0.02, 1, count)
    spine = seed + (length * along)[:, None] * _direction(heading + 0.12 * (along - 0.5))
    reach = 0.5 * length * along**0.5 * (1.03 - along) * rng.uniform(0.3, 1.0, (2, count))
    sides = np.array([[look.splay], [-look.splay]])
    tips = spine + reach[..., None] * _direction(heading + sides + rng.normal(0, 0.05, (2, count)))
    tone, shade = rng.uniform(50, 150), rng.integers(len(_SHADES), size=(2, count))
    for index, brighter in enumerate(_SHADES):
        side, step = np.nonzero(shade == index)
        # One stroke: along the spine, out to each tip and back.
        stroke = np.stack((spine[step], tips[side, step], spine[step]), axis=1).reshape(-1, 2)
        cv2.polylines(canvas, [_fixed(stroke)], False, tone + brighter, 1, cv2.LINE_AA, _SHIFT)
    cv2.polylines(canvas, [_fixed(spine)], False, tone + 95, 1, cv2.LINE_AA, _SHIFT)


def _fixed(points: Points) -> npt.NDArray[np.int32]:
    """OpenCV draws at sub-pixel positions given as integers with `_SHIFT` fractional bits."""
    return np.round(points * 2**_SHIFT).astype(np.int32)


def _direction(angle: Points) -> Points:
    return np.stack((np.cos(angle), np.sin(angle)), axis=-1)
