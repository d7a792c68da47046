"""Image corruptions for grounding under shift: same canvas, same boxes, same pixels for the same key.

The corruptions and their five severities are those of Hendrycks & Dietterich (ICLR 2019, ImageNet-C, the 224-pixel
constants), for images of any size as in Michaelis et al. (arXiv 1907.07484). `low_light` is ours. Four of the original
corruptions move what they show: zoom_blur, elastic_transform, motion_blur and glass_blur are in
`lmms_plugin.shifts.image.moving`, with the boxes that move along. Of the last two there is a centred form here, which
leaves every object in place.

A shift is one function: `f(image, rng, *level) -> image`, (h, w, 3) uint8 RGB in and out, with the `level` of each
severity given to the decorator, which registers it in `SHIFTS` and so in the tests.
"""

# OpenCV ships no types here and numpy types much arithmetic as Any.
# mypy: disable-error-code="no-any-return"

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from lmms_plugin.shifts.image.motion import one_sided_trail, shuffle_sources, smear
from lmms_plugin.shifts.image.noise import sensor_channel, shot_channel
from lmms_plugin.shifts.image.opencv import cv2
from lmms_plugin.shifts.image.textures import ice_crop, plasma
from lmms_plugin.shifts.severities import SEVERITIES, checked, generator, named
from lmms_plugin.utils.images import to_rgb

Pixels = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
Corruption = Callable[..., Pixels]


@dataclass(frozen=True)
class Shift:
    """Corruption with its five severities, which leaves boxes where they are.

    At every severity the half-maximum box of a white rectangle (96x72 and 32x32 px, measured in the tests) keeps its
    centre within 1.5 px and an IoU above 0.8 with the true box. Only centred_glass_blur comes near that; pixelate stays
    within 0.5 px and 0.9, the others within rounding.

    Attributes:
        name: Name of the function, Hendrycks & Dietterich's where they have the corruption.
        function: Function f(image (h, w, 3) uint8, rng, *level) -> the same shape.
        levels: Arguments of severity 1 to 5.
        drawn_as: Name that seeds the draws; the function's own, or the one under which its pixels were recorded.
    """

    name: str
    function: Corruption
    levels: tuple[tuple[float, ...], ...]
    drawn_as: str


SHIFTS: dict[str, Shift] = {}


def shift(*levels: tuple[float, ...], drawn_as: str = "") -> Callable[[Corruption], Corruption]:
    """Register the decorated function in `SHIFTS` under its own name, with one tuple of arguments per severity."""
    if len(levels) != len(SEVERITIES):
        raise ValueError(f"expected {len(SEVERITIES)} levels, got {len(levels)}")

    def register(function: Corruption) -> Corruption:
        SHIFTS[function.__name__] = Shift(function.__name__, function, levels, drawn_as or function.__name__)
        return function

    return register


def apply(image: Image.Image, name: str, severity: int, key: str | int) -> Image.Image:
    """Return `image`, upright, under the shift `name`, as RGB of the same size.

    The random draws follow from (key, name, severity) alone, by hash: not from the process, the order of calls or the
    platform. The bytes are identical for one build of numpy, OpenCV and Pillow on processors with the same
    instructions; on others, values of blurs, frost and fog can differ by 1, where OpenCV's sums are integers up to
    rounding.

    Args:
        image: Image of at least one pixel, any mode that `lmms_plugin.utils.images.to_rgb` takes. Not changed.
        name: Key of `SHIFTS`.
        severity: Severity, 1 to 5.
        key: Key of the random draws, usually the image's id. 7 and "7" are the same key.

    Raises:
        ValueError: Unknown name (the message gives the nearest), severity not an integer from 1 to 5, empty image,
            unfit mode, a side too long for `jpeg_compression`.
        TypeError: A key that is neither text nor an integer.
    """
    chosen, severity = named(name, SHIFTS), checked(severity, name)
    pixels = np.asarray(to_rgb(image))
    rng = generator(key, chosen.drawn_as, severity)
    return Image.fromarray(chosen.function(pixels, rng, *chosen.levels[severity - 1]))


def floored(field: Field) -> Pixels:
    """Clip to 0 … 255 in place and truncate, as the original does; rounding would brighten by half a level."""
    return np.clip(field, 0, 255, out=field).astype(np.uint8)


def _grey(plane: Field) -> Field:
    """Return one plane as three equal channels; numpy's own broadcasting over a last axis of three is slow."""
    return cv2.merge((plane, plane, plane))


# Noise


@shift((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))
def gaussian_noise(image: Pixels, rng: np.random.Generator, sigma: float) -> Pixels:
    """Add N(0, sigma²), in units of white, to every channel."""
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= 255 * sigma
    noise += image
    return floored(noise)


@shift((60,), (25,), (12,), (5,), (3,))
def shot_noise(image: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    """Draw Poisson counts with `photons` expected at white, scaled back."""
    return shot_channel(photons).sample(image, rng)


@shift((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))
def impulse_noise(image: Pixels, rng: np.random.Generator, amount: float) -> Pixels:
    """Set the share `amount` of all channel values to black or white, with equal probability."""
    draw = rng.integers(0, 2**16, image.shape, dtype=np.uint16)
    corrupted, half = image.copy(), round(amount * 2**15)
    corrupted[draw < 2 * half] = 255
    corrupted[draw < half] = 0
    return corrupted


@shift((0.15,), (0.2,), (0.35,), (0.45,), (0.6,))
def speckle_noise(image: Pixels, rng: np.random.Generator, sigma: float) -> Pixels:
    """Multiply every channel value by N(1, sigma²)."""
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= sigma
    noise += 1
    noise *= image
    return floored(noise)


@shift((0.5, 1000, 4), (0.25, 700, 4), (0.12, 500, 5), (0.06, 400, 5), (0.03, 300, 6))
def low_light(image: Pixels, rng: np.random.Generator, exposure: float, electrons: float, read: float) -> Pixels:
    """Under-expose by one to five stops with photon and read-out noise of a small sensor, without brightening again.

    Linear light times `exposure`, Poisson electrons (`electrons` at the white of a well-exposed image), Gaussian
    read-out noise of `read` electrons, sRGB: `sensor_channel`. The model is Foi et al. (2008, IEEE TIP 17(10)); that
    low light means less light plus Poissonian-Gaussian noise is also Kar et al.'s definition (CVPR 2022, 3D Common
    Corruptions). The constants are ours: numbers compare within this package only.
    """
    return sensor_channel(exposure, electrons, read).sample(image, rng)


# Blur


def gaussian_kernel_size(sigma: float) -> int:
    """Return the taps of a Gaussian cut at four standard deviations, as in scikit-image."""
    return 2 * int(4 * sigma + 0.5) + 1


def gaussian(field: Field, sigma: float) -> Field:
    """Blur with a Gaussian of `sigma` pixels; edges are repeated."""
    size = gaussian_kernel_size(sigma)
    return cv2.GaussianBlur(field, (size, size), sigma, borderType=cv2.BORDER_REPLICATE)


@shift((1,), (2,), (3,), (4,), (6,))
def gaussian_blur(image: Pixels, _: np.random.Generator, sigma: float) -> Pixels:
    """Blur with a Gaussian of `sigma` pixels."""
    return floored(gaussian(image.astype(np.float32), sigma))


@shift((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
def defocus_blur(image: Pixels, _: np.random.Generator, radius: int, softness: float) -> Pixels:
    """Blur with a disc of `radius` pixels whose rim is softened by a Gaussian of `softness` pixels."""
    reach, rim = (8, 3) if radius <= 8 else (radius, 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disc / disc.sum(), (rim, rim), softness)
    return floored(cv2.filter2D(image, cv2.CV_32F, kernel))


MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
"""Radius in pixels and standard deviation of the taps, by severity."""
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
"""Standard deviation of the blur, reach of a step in pixels, and passes, by severity."""


@shift(*MOTION, drawn_as="motion_blur")
def centred_motion_blur(image: Pixels, rng: np.random.Generator, radius: int, sigma: float) -> Pixels:
    """Blur by camera shake along a random direction within 45° of horizontal.

    The original weights 2·radius + 1 taps by one half of a Gaussian, which displaces the picture by 2 to 10 px. Here
    the same number of taps carry a whole Gaussian of the same variance, centred, so that boxes stay.
    """
    taps = np.arange(2 * radius + 1)
    trail = one_sided_trail(radius, sigma)
    variance = trail @ taps**2 - (trail @ taps) ** 2
    centred = np.exp(-((taps - radius) ** 2) / (2 * variance))
    return floored(smear(image, centred / centred.sum(), rng.uniform(-45, 45), start=-radius))


@shift(*GLASS, drawn_as="glass_blur")
def centred_glass_blur(image: Pixels, rng: np.random.Generator, sigma: float, reach: int, passes: int) -> Pixels:
    """Blur, shuffle locally by up to `reach` pixels, `passes` times, and blur again.

    One pass of the original displaces the picture by 0.5 to 0.9 px down and to the right. Here every second pass runs
    in the opposite direction, which cancels that for an even number of passes.
    """
    return through_glass(image, rng, sigma, reach, [turn % 2 == 1 for turn in range(passes)])


def through_glass(
    image: Pixels, rng: np.random.Generator, sigma: float, reach: int, backwards: Sequence[bool]
) -> Pixels:
    """Blur by `sigma`, shuffle by up to `reach` pixels once per entry of `backwards`, and blur again.

    Args:
        image: (h, w, 3).
        rng: Source of randomness.
        sigma: Standard deviation of both blurs, pixels.
        reach: Bound of a step in either direction, pixels.
        backwards: Whether a pass walks the other way than the original's.
    """
    softened = floored(gaussian(image.astype(np.float32), sigma))
    height, width = softened.shape[:2]
    offset = np.arange(-reach, reach)
    steps = (offset[:, None] * width + offset).ravel()
    source = np.arange(height * width)
    for turned in backwards:
        draw = rng.integers(0, len(steps), (height, width), dtype=np.uint8)
        shuffled = shuffle_sources(steps.take(draw), reach)
        source = source.take(len(source) - 1 - shuffled[::-1] if turned else shuffled)
    whole = cv2.cvtColor(softened, cv2.COLOR_RGB2RGBA).view(np.uint32)
    moved = whole.ravel().take(source).view(np.uint8).reshape(height, width, 4)
    return floored(gaussian(cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB).astype(np.float32), sigma))


# Weather


@shift((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
def frost(image: Pixels, rng: np.random.Generator, keep: float, thickness: float) -> Pixels:
    """View through a frosted window: keep · image + thickness · ice. The ice is drawn, not photographed."""
    height, width = image.shape[:2]
    return floored(cv2.addWeighted(image, keep, ice_crop(height, width, rng), thickness, 0, dtype=cv2.CV_32F))


@shift(
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
def snow(
    image: Pixels,
    rng: np.random.Generator,
    mean: float,
    spread: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    keep: float,
) -> Pixels:
    """Whiten the scene and add falling flakes: enlarged noise above a threshold, smeared along the fall."""
    height, width = image.shape[:2]
    rows, columns = math.ceil(height / zoom), math.ceil(width / zoom)
    noise = mean + spread * rng.standard_normal((rows, columns), dtype=np.float32)
    flakes = _enlarged(noise, zoom, height, width)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = np.round(255 * smear(flakes, one_sided_trail(radius, sigma), rng.uniform(-135, -45), start=0))
    scene = image.astype(np.float32)
    white = _grey(1.5 * cv2.cvtColor(scene, cv2.COLOR_RGB2GRAY) + 127.5)
    whitened = cv2.addWeighted(scene, keep, cv2.max(scene, white), 1 - keep, 0)
    return floored(cv2.add(whitened, _grey(flakes + flakes[::-1, ::-1])))


def _enlarged(field: Field, zoom: float, height: int, width: int) -> Field:
    """Enlarge bilinearly with the corners of both grids aligned, cropped to (height, width).

    The grid is scipy.ndimage.zoom's, not cv2.resize's: sample positions decide how many flakes pass the threshold.
    """
    scale = [(size - 1) / max(round(size * zoom) - 1, 1) for size in field.shape]
    grid = np.array([[scale[1], 0, 0], [0, scale[0], 0]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(field, grid, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


# A square cloud stays below it up to an aspect ratio of 4, and so do grey values of the fog.
_LARGEST_CLOUD = 16


@shift((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
def fog(image: Pixels, rng: np.random.Generator, thickness: float, decay: float) -> Pixels:
    """Add a plasma cloud up to `thickness` times white, then scale back to the image's own maximum."""
    height, width = image.shape[:2]
    cloud = plasma(*cloud_size(height, width), decay, rng)[:height, :width]
    brightest = float(image.max())
    share = brightest / (brightest + 255 * thickness)
    return floored(cv2.addWeighted(image, share, _grey(cloud), 255 * thickness * share, 0, dtype=cv2.CV_32F))


def cloud_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width of the cloud: the original's square, or a strip where that is far too large."""
    rows, columns = (1 << max(1, (side - 1).bit_length()) for side in (height, width))
    square = max(rows, columns)
    return (square, square) if square**2 <= _LARGEST_CLOUD * height * width else (rows, columns)


@shift(
    (0.65, 0.3, 4, 0.69, 0.6),
    (0.65, 0.3, 3, 0.68, 0.6),
    (0.65, 0.3, 2, 0.68, 0.5),
    (0.65, 0.3, 1, 0.65, 1.5),
    (0.67, 0.4, 1, 0.65, 1.5),
)
def spatter(
    image: Pixels, rng: np.random.Generator, mean: float, spread: float, size: float, threshold: float, body: float
) -> Pixels:
    """Splash the lens with water (`body` below 1 is its brightness) or mud (`body` is the softness of its rim)."""
    noise = mean + spread * rng.standard_normal(image.shape[:2], dtype=np.float32)
    liquid = gaussian(noise, size)
    liquid[liquid < threshold] = 0
    return _water(image, liquid, body) if body < 1 else _mud(image, liquid, body)


PALE_TURQUOISE = (175, 238, 238)
MUD_BROWN = (63, 42, 20)


def _water(image: Pixels, liquid: Field, brightness: float) -> Pixels:
    """Draw drops lit from one side: relief of the distance to their rims."""
    depth = (255 * liquid).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(depth, 50, 150), cv2.DIST_L2, 5)
    relief = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(relief, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    drops = depth * cv2.blur(relief, (3, 3)).astype(np.float32)
    drops *= brightness / max(drops.max(), 1)
    return floored(image + cv2.merge([drops * colour for colour in PALE_TURQUOISE]))


def _mud(image: Pixels, liquid: Field, softness: float) -> Pixels:
    cover = gaussian((liquid > 0).astype(np.float32), softness)
    cover[cover < 0.8] = 0
    planes = cv2.split(image.astype(np.float32))
    covered = [plane + cover * (colour - plane) for plane, colour in zip(planes, MUD_BROWN, strict=True)]
    return floored(cv2.merge(covered))


# Digital


@shift((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))
def brightness(image: Pixels, _: np.random.Generator, gain: float) -> Pixels:
    """Add `gain` to the V of HSV."""
    planes = cv2.split(image)
    row = cv2.max(cv2.max(planes[0], planes[1]), planes[2]).astype(np.intp) << 8
    return cv2.merge([_brightened(gain).take(row | plane) for plane in planes])


@lru_cache(maxsize=len(SEVERITIES))
def _brightened(gain: float) -> Pixels:
    """Return the new level of a channel, (256, 256), by its pixel's V and its level; hue and saturation are kept."""
    value, level = np.mgrid[:256, :256]
    brighter = np.minimum(value + 255 * gain, 255)
    return np.clip(np.where(value > 0, level / np.maximum(value, 1), 1) * brighter, 0, 255).astype(np.uint8)


@shift((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))
def contrast(image: Pixels, _: np.random.Generator, keep: float) -> Pixels:
    """Pull every channel towards its mean over the image."""
    mean = np.array(cv2.mean(image)[:3])
    levels = (np.arange(256.0)[:, None] - mean) * keep + mean
    return cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8)[:, None])


@shift((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
def saturate(image: Pixels, _: np.random.Generator, gain: float, offset: float) -> Pixels:
    """Map the S of HSV to gain · S + offset. Severity 1 and 2 desaturate, 3 to 5 saturate: not monotone."""
    red, green, blue = cv2.split(image)
    value, low = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    ratio = _saturated(gain, offset).take((value.astype(np.intp) << 8) | low)
    top = value.astype(np.float32)
    # A grey pixel has no hue; HSV says red, and so does the original where `offset` gives grey a saturation.
    reddened = offset * top * (value == low)
    planes = [top - (top - red) * ratio, *(top - (top - plane) * ratio - reddened for plane in (green, blue))]
    return floored(cv2.merge(planes))


@lru_cache(maxsize=len(SEVERITIES))
def _saturated(gain: float, offset: float) -> Field:
    """Return new over old saturation, (256, 256), by the largest and smallest channel of a pixel; 1 where it was 0."""
    value, low = np.mgrid[:256, :256]
    old = np.clip(1 - low / np.maximum(value, 1), 0, 1)
    new = np.clip(gain * old + offset, 0, 1)
    return np.divide(new, old, out=np.ones_like(old), where=old > 0).astype(np.float32)


@shift((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))
def pixelate(image: Pixels, _: np.random.Generator, scale: float) -> Pixels:
    """Shrink by `scale` and enlarge again with square pixels: lost resolution on the same canvas."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize(
        (max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


# libjpeg's JPEG_MAX_DIMENSION.
_LONGEST_JPEG = 65500


@shift((25,), (18,), (15,), (10,), (7,))
def jpeg_compression(image: Pixels, _: np.random.Generator, quality: int) -> Pixels:
    """Compress as JPEG at `quality`, with Pillow's own chroma subsampling.

    Raises:
        ValueError: A side is longer than JPEG allows.
    """
    height, width = image.shape[:2]
    if max(height, width) > _LONGEST_JPEG:
        raise ValueError(f"jpeg_compression: expected sides of at most {_LONGEST_JPEG} pixels, got {width}x{height}")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
