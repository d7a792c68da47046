import importlib.util
import subprocess
import sys
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from helpers import imagecorruptions_reference
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench import corruptions
from lmms_plugin.shifts.image import corruptions as shifts
from lmms_plugin.shifts.image import noise as channel_noise
from lmms_plugin.shifts.image import textures
from lmms_plugin.shifts.image.corruptions import SHIFTS, apply
from lmms_plugin.shifts.image.motion import shuffle_sources
from lmms_plugin.shifts.severities import SEVERITIES
from lmms_plugin.utils.images import to_rgb

NAMES = tuple(SHIFTS)
DETERMINISTIC = (
    "defocus_blur",
    "gaussian_blur",
    "brightness",
    "contrast",
    "saturate",
    "pixelate",
    "jpeg_compression",
)
RANDOM = tuple(name for name in NAMES if name not in DETERMINISTIC)
every_shift = pytest.mark.parametrize("name", NAMES)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


@pytest.fixture(scope="module")
def reference():
    if importlib.util.find_spec("imagecorruptions") is None:
        pytest.skip("imagecorruptions, the reference, is not installed (extra `dev`)")
    return imagecorruptions_reference.load()


@cache
def photo(name="astronaut", side=160):
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((side, side), Image.Resampling.BOX)


def pixels(image):
    return np.asarray(image).astype(np.float64)


def psnr(corrupted, clean):
    return 10 * np.log10(255**2 / np.mean((pixels(corrupted) - pixels(clean)) ** 2))


def test_the_eighteen_corruptions_of_the_task():
    assert set(NAMES) == {
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "low_light"),
        *("defocus_blur", "centred_glass_blur", "centred_motion_blur", "gaussian_blur"),
        *("frost", "snow", "fog", "spatter"),
        *("brightness", "contrast", "saturate", "pixelate", "jpeg_compression"),
    }
    assert all(len(shift.levels) == 5 and shift.name == name for name, shift in SHIFTS.items())


def test_a_shift_needs_one_level_per_severity():
    with pytest.raises(ValueError, match="expected 5 levels, got 2"):
        shifts.shift((1,), (2,))


# Agreement with imagecorruptions


@every_severity
@pytest.mark.parametrize("picture", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_equals_imagecorruptions_where_that_is_deterministic(reference, name, picture, severity):
    theirs = imagecorruptions_reference.corrupt(reference, photo(picture), name, severity, seed=0)
    difference = np.abs(pixels(apply(photo(picture), name, severity, key=0)) - theirs)
    # Both truncate to whole levels, so a value that float32 here and float64 there put on two sides of an integer may
    # differ by one level, no value by more. Where results are integers (saturate 3) theirs often fall a hair below.
    assert difference.max() <= 1
    assert difference.mean() < 0.25


# Tolerance of the mean PSNR (dB) and of the mean and the standard deviation of the grey value: several standard errors
# of the reference's own spread. Fog and frost vary most: where the cloud or the ice lies differs from key to key.
TOLERANCE = {
    "gaussian_noise": (0.05, 0.3),
    "shot_noise": (0.05, 0.3),
    "impulse_noise": (0.15, 0.5),
    "speckle_noise": (0.05, 0.3),
    "snow": (0.3, 1.5),
    "frost": (2.0, 15),
    "fog": (1.5, 15),
    "spatter": (0.6, 1.5),
}


@every_severity
@pytest.mark.parametrize("name", TOLERANCE)
def test_agrees_with_imagecorruptions_in_distribution(reference, name, severity):
    clean = photo("coffee")
    keys = range(30 if name in ("fog", "frost") else 12)
    ours = [pixels(apply(clean, name, severity, key)) for key in keys]
    theirs = [imagecorruptions_reference.corrupt(reference, clean, name, severity, seed).astype(float) for seed in keys]
    decibels, levels = TOLERANCE[name]
    if (name, severity) == ("spatter", 1):
        decibels = 4  # a few drops a picture: the PSNR of either scatters by 4 dB
    quality = [np.mean([psnr(x, clean) for x in images]) for images in (ours, theirs)]
    assert quality[0] == pytest.approx(quality[1], abs=decibels)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=levels)
    assert np.mean([x.std() for x in ours]) == pytest.approx(np.mean([x.std() for x in theirs]), abs=levels)


def aligned_psnr(corrupted, clean):
    inner = np.s_[8:-8, 8:-8]
    moves = [np.roll(pixels(corrupted), (dy, dx), axis=(0, 1)) for dy in (-2, -1, 0) for dx in (-2, -1, 0)]
    return max(psnr(moved[inner], pixels(clean)[inner]) for moved in moves)


@every_severity
def test_centred_glass_blur_agrees_with_imagecorruptions_in_distribution(reference, severity):
    clean = photo("coffee", side=64)  # the reference loops over pixels in Python
    theirs = [imagecorruptions_reference.corrupt(reference, clean, "glass_blur", severity, seed) for seed in range(3)]
    ours = [apply(clean, "centred_glass_blur", severity, key) for key in range(12)]
    # Each at its own best alignment: ours is centred, the reference is not. One pass is compared exactly below.
    quality = [np.mean([aligned_psnr(x, clean) for x in images]) for images in (ours, theirs)]
    assert quality[0] == pytest.approx(quality[1], abs=0.8)
    assert np.mean([pixels(x).std() for x in ours]) == pytest.approx(np.mean([x.std() for x in theirs]), abs=1.0)


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(24, 31), (9, 40), (3, 3), (1, 5)], ids=str)
def test_one_glass_pass_equals_the_pixel_by_pixel_walk(reach, size):
    height, width = size
    dy, dx = np.random.default_rng(reach).integers(-reach, reach, (2, height, width))
    walked = np.arange(height * width).reshape(height, width)
    for y in range(height - reach, reach, -1):
        for x in range(width - reach, reach, -1):
            walked[y, x] = walked[y + dy[y, x], x + dx[y, x]]
    assert np.array_equal(shuffle_sources(dy * width + dx, reach), walked.ravel())


@every_severity
def test_centred_motion_blur_has_the_extent_and_the_spread_of_the_original_but_no_displacement(reference, severity):
    radius, _ = SHIFTS["centred_motion_blur"].levels[severity - 1]
    point = Image.new("RGB", (129, 129))
    point.putpixel((64, 64), (255, 255, 255))
    y, x = np.mgrid[:129, :129] - 64

    def moments(image):
        weight = image[..., 0].astype(float) / image[..., 0].sum()
        centre = (weight * x).sum(), (weight * y).sum()
        return np.hypot(*centre), (weight * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)).sum()

    ours, theirs = [], []
    for key in range(10):
        blurred = np.asarray(apply(point, "centred_motion_blur", severity, key))
        assert np.hypot(x, y)[blurred[..., 0] > 0].max() <= radius + 1
        ours.append(moments(blurred))
        theirs.append(moments(imagecorruptions_reference.corrupt(reference, point, "motion_blur", severity, key)))
    (shift, spread), (their_shift, their_spread) = np.mean(ours, axis=0), np.mean(theirs, axis=0)
    assert shift < 0.4 < their_shift
    assert spread == pytest.approx(their_spread, rel=0.15)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", ["centred_motion_blur", "centred_glass_blur"])
def test_what_is_milder_than_the_original_is_its_displacement_alone(reference, name, severity):
    row = corruptions.strength(name, severity, reference)
    assert row["ours"] == pytest.approx(row["theirs_in_place"], rel=0.05)
    assert row["ours"] < 0.95 * row["theirs"]
    said = [float(cell.split(" / ")[(1, 3, 5).index(severity)]) for cell in documented()[name]]
    assert [row[column] for column in ("theirs", "theirs_in_place", "ours")] == pytest.approx(said, abs=0.3)


def test_every_corruption_is_in_the_documented_table():
    assert tuple(documented()) == (*NAMES, *corruptions.MOVED)


def documented():
    page = (Path(__file__).parents[2] / "docs" / "corruptions.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in rows[2:]}


# Severity


def correlation(corrupted, clean):
    return np.corrcoef(pixels(corrupted).ravel(), pixels(clean).ravel())[0, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "saturate"])
def test_more_severity_hurts_more(name):
    clean = photo("coffee", side=256)
    # The original's frost 4 is its frost 3 behind a darker glass, nearer to the clean image in brightness alone.
    likeness = correlation if name == "frost" else psnr

    def quality(level, seed):
        return likeness(SHIFTS[name].function(np.asarray(clean), np.random.default_rng(seed), *level), clean)

    # The same draws at every severity, so that the same window frosts over and the same cloud thickens.
    qualities = [np.mean([quality(level, seed) for seed in range(8)]) for level in SHIFTS[name].levels]
    assert qualities == sorted(qualities, reverse=True)
    assert len(set(qualities)) == 5


def test_saturate_takes_colour_away_first_and_adds_it_later():
    def colourfulness(image):
        return np.ptp(pixels(image), axis=2).mean()

    levels = [colourfulness(apply(photo(), "saturate", s, 0)) for s in SEVERITIES]
    assert levels[1] < levels[0] < colourfulness(photo()) < levels[2] < levels[3] < levels[4]


# Randomness


@pytest.mark.parametrize("name", RANDOM)
def test_key_and_severity_choose_the_draws(name):
    first = apply(photo(), name, 3, "COCO_7")
    assert first.tobytes() == apply(photo(), name, 3, "COCO_7").tobytes()
    assert first.tobytes() != apply(photo(), name, 3, "COCO_8").tobytes()
    assert apply(photo(), name, 3, 7).tobytes() == apply(photo(), name, 3, "7").tobytes()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_shifts_ignore_the_key(name):
    assert apply(photo(), name, 3, 1).tobytes() == apply(photo(), name, 3, 2).tobytes()


def test_draws_are_independent_across_severities_and_names():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = [pixels(apply(grey, name, s, 0)).ravel() for name in ("gaussian_noise", "speckle_noise") for s in (1, 2)]
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.05


CHECKSUMS = """
import zlib, numpy as np
from PIL import Image
from lmms_plugin.shifts.image.corruptions import SHIFTS, apply
y, x = np.mgrid[:48, :64]
image = Image.fromarray(np.stack([4 * x, 5 * y, 255 - 3 * x], axis=-1).astype(np.uint8))
print([zlib.crc32(apply(image, name, 4, "a key").tobytes()) for name in SHIFTS])
"""


def test_same_bytes_in_processes_with_other_hash_seeds():
    runs = [
        subprocess.run(
            [sys.executable, "-P", "-c", CHECKSUMS], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != b""


@pytest.mark.parametrize("threads", [1, 4])
def test_same_bytes_from_many_threads(threads):
    textures.ice.cache_clear()
    channel_noise.shot_channel.cache_clear()
    jobs = [(name, 3, key) for name in RANDOM for key in range(3)]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(lambda job: zlib.crc32(apply(photo(), *job).tobytes()), jobs))
    assert together == [zlib.crc32(apply(photo(), *job).tobytes()) for job in jobs]


def test_opencv_threads_do_not_change_the_bytes():
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = [apply(photo(side=400), name, 3, 0).tobytes() for name in NAMES]
        cv2.setNumThreads(2)
        assert alone == [apply(photo(side=400), name, 3, 0).tobytes() for name in NAMES]
    finally:
        cv2.setNumThreads(before)


# Laws of the pixel noise


@pytest.mark.parametrize("photons", [60, 25, 12, 5, 3])
@pytest.mark.parametrize("level", [0, 1, 40, 128, 255])
def test_shot_noise_is_poisson(photons, level):
    draws = 40_000
    flat = np.full(draws, level, np.uint8)
    drawn = channel_noise.shot_channel(photons).sample(flat, np.random.default_rng(1))
    counts = np.random.default_rng(2).poisson(level / 255 * photons, draws)
    expected = np.uint8(np.clip(counts / photons, 0, 1) * 255)
    share = [np.bincount(x, minlength=256) / draws for x in (drawn, expected)]
    assert 0.5 * np.abs(share[0] - share[1]).sum() < 0.02  # total variation; two fair samples stay below 0.02
    assert drawn.mean() == pytest.approx(expected.mean(), abs=5 * 255 / np.sqrt(photons * draws))


def test_poisson_probabilities_by_hand():
    law = channel_noise.poisson(np.array([0.0, 2.0]), 4)
    assert law[0].tolist() == [1, 0, 0, 0]
    assert law[1] == pytest.approx(np.exp(-2) * np.array([1, 2, 2, 4 / 3]))


def test_low_light_reading_is_poissonian_gaussian():
    exposure, electrons, read = SHIFTS["low_light"].levels[2]
    level, draws = 200, 60_000
    drawn = channel_noise.sensor_channel(exposure, electrons, read).sample(
        np.full(draws, level, np.uint8), np.random.default_rng(1)
    )
    rng = np.random.default_rng(2)
    linear = ((level / 255 + 0.055) / 1.055) ** 2.4
    reading = (rng.poisson(exposure * electrons * linear, draws) + rng.normal(0, read, draws)) / electrons
    reading = np.clip(reading, 0, 1)
    encoded = np.where(reading <= 0.0031308, 12.92 * reading, 1.055 * reading ** (1 / 2.4) - 0.055)
    expected = np.rint(255 * encoded)
    assert drawn.mean() == pytest.approx(expected.mean(), abs=0.3)
    assert drawn.std() == pytest.approx(expected.std(), rel=0.02)
    assert np.percentile(drawn, [5, 50, 95]) == pytest.approx(np.percentile(expected, [5, 50, 95]), abs=1)


def test_alias_tables_hold_the_matrix():
    matrix = np.random.default_rng(0).dirichlet(np.full(256, 0.05), 256)
    cells = channel_noise.Channel.from_matrix(matrix).cells.reshape(256, 256)
    share, alias = (cells >> 8) / 2**24, cells & 255
    held = share.copy()
    for row in range(256):
        np.add.at(held[row], alias[row], 1 - share[row])
    assert np.abs(held / 256 - matrix).max() < 1e-6


@pytest.mark.parametrize("matrix", [np.eye(3), np.full((256, 256), 0.1), np.eye(256) * 2 - 1 / 256], ids=str)
def test_a_channel_is_made_of_distributions(matrix):
    with pytest.raises(ValueError, match="rows that sum to 1"):
        channel_noise.Channel.from_matrix(matrix)


@pytest.mark.parametrize("severity", [1, 5])
def test_impulse_noise_hits_the_stated_share_half_black_half_white(severity):
    grey = Image.new("RGB", (400, 400), (128, 128, 128))
    noisy = np.asarray(apply(grey, "impulse_noise", severity, 0))
    (amount,) = SHIFTS["impulse_noise"].levels[severity - 1]
    assert np.mean(noisy == 0) == pytest.approx(amount / 2, abs=0.003)
    assert np.mean(noisy == 255) == pytest.approx(amount / 2, abs=0.003)
    assert set(np.unique(noisy)) == {0, 128, 255}


# Boxes


BOX = (70, 50, 166, 122)
SMALL_BOX = (60, 60, 92, 92)


def scene(box=None):
    image = np.full((200, 240, 3), 25, np.uint8)
    image[190:, 230:] = 230  # the brightest pixel is as bright with the box as without
    if box:
        image[box[1] : box[3], box[0] : box[2]] = 230
    return Image.fromarray(image)


def trace(name, severity, key, box):
    """What the box leaves in the corrupted image: the difference to the same shift of the scene without it."""
    with_box, without = (pixels(apply(image, name, severity, key)) for image in (scene(box), scene()))
    return (with_box - without).mean(axis=2)


def half_maximum_box(trace, box):
    """Where a trace falls to half of its height, in pixels."""
    left, top, right, bottom = box
    quarter_x, quarter_y = (right - left) // 4, (bottom - top) // 4
    across = np.median(trace[top + quarter_y : bottom - quarter_y], axis=0)
    down = np.median(trace[:, left + quarter_x : right - quarter_x], axis=1)
    (x1, x2), (y1, y2) = half_maxima(across, left, right), half_maxima(down, top, bottom)
    return x1, y1, x2, y2


def half_maxima(profile, start, end):
    middle, quarter = (start + end) // 2, (end - start) // 4
    inside, outside = profile[middle - quarter : middle + quarter].mean(), np.median(np.r_[profile[:12], profile[-12:]])
    above = (profile - outside) / (inside - outside) > 0.5
    # A side is where the run of bright pixels through the middle ends; lone dark pixels (noise, spatter) do not end it.
    dark = np.flatnonzero(~above[:-1] & ~above[1:])
    return dark[dark < middle].max() + 2, dark[dark >= middle].min()


def iou(a, b):
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area - width * height)


@every_severity
@every_shift
@pytest.mark.parametrize("box", [BOX, SMALL_BOX], ids=["96x72", "32x32"])
def test_boxes_stay_where_they_are(name, severity, box):
    traces = [trace(name, severity, key, box) for key in range(6)]
    if name in ("snow", "spatter"):  # these hide other parts of the box for every key: their median shows it whole
        traces = [np.median(traces, axis=0)]
    found = np.array([half_maximum_box(t, box) for t in traces])
    displacement = (found[:, :2] + found[:, 2:] - np.add(box[:2], box[2:])) / 2
    assert np.abs(displacement).max() <= 1.5
    assert min(iou(f, box) for f in found) > 0.8


def test_the_box_measure_sees_a_displacement():
    moved = np.roll(np.asarray(scene(BOX)), (2, 5), axis=(0, 1))
    assert half_maximum_box((moved - pixels(scene())).mean(axis=2), BOX) == (75, 52, 171, 124)


# Input


def as_mode(mode, size):
    image = photo().resize(size)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    return image.convert(mode)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (5, 3), (97, 64)], ids=str)
@every_shift
def test_any_size_keeps_its_canvas(name, size):
    for severity in (1, 3, 5):
        corrupted = apply(photo().resize(size), name, severity, 0)
        assert (corrupted.mode, corrupted.size) == ("RGB", size)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "I;16"]
)
@every_shift
def test_any_mode_comes_out_as_rgb(name, mode):
    corrupted = apply(as_mode(mode, (33, 20)), name, 2, 0)
    assert (corrupted.mode, corrupted.size) == ("RGB", (33, 20))


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (9000, 3), (3, 9000), (4100, 150), (1, 1), (2, 3)], ids=str)
@every_shift
def test_memory_is_bounded_by_the_area_of_the_image(name, size):
    """NumPy's and OpenCV's arrays: at most 200 bytes per pixel and a megabyte, whatever the shape."""
    image = photo().resize(size)
    apply(photo().resize((9, 9)), name, 5, 0)  # textures and tables that are kept
    for severity in (1, 3, 5):
        apply(photo().resize((9, 9)), name, severity, 0)
        tracemalloc.start()
        try:
            corrupted = apply(image, name, severity, 0)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert corrupted.size == size
        assert peak < 200 * size[0] * size[1] + 2**20


def test_a_side_that_no_jpeg_can_have_is_said():
    with pytest.raises(ValueError, match="at most 65500 pixels, got 1x65501"):
        apply(Image.new("RGB", (1, 65501)), "jpeg_compression", 1, 0)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I", "I;16"])
def test_opaque_modes_lose_nothing(mode):
    grey = photo().convert("L")
    assert np.array_equal(to_rgb(as_mode(mode, photo().size)).convert("L"), grey) or mode == "RGBA"
    assert np.array_equal(to_rgb(photo().convert("RGBA")), photo())


def test_transparency_shows_white_paper():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (0, 0, 0, 255))
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert list(to_rgb(half).tobytes()) == [255, 255, 255, 0, 0, 0]
    assert list(to_rgb(palette).tobytes()) == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_cut():
    image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_image_is_not_changed():
    before = photo().tobytes()
    for name in NAMES:
        apply(photo(), name, 5, 0)
    assert photo().tobytes() == before


@pytest.mark.parametrize("colour", [0, 255])
@every_shift
def test_black_and_white_images_are_no_special_case(name, colour):
    corrupted = pixels(apply(Image.new("RGB", (40, 30), (colour,) * 3), name, 3, 0))
    if name.endswith("blur") or name in ("contrast", "pixelate", "jpeg_compression"):
        assert np.abs(corrupted - colour).max() <= 2


@pytest.mark.parametrize(
    ("name", "severity", "key", "error", "message"),
    [
        ("gausian_noise", 1, 0, ValueError, "unknown shift 'gausian_noise', did you mean 'gaussian_noise'"),
        ("Frost", 1, 0, ValueError, "did you mean 'frost'"),
        ("zoom_blur", 1, 0, ValueError, "unknown shift 'zoom_blur'"),
        ("", 1, 0, ValueError, r"unknown shift '' \(known: "),
        ("fog", 0, 0, ValueError, "severity of fog: expected an integer from 1 to 5, got 0"),
        ("fog", 6, 0, ValueError, "got 6"),
        ("fog", 3.0, 0, ValueError, "got 3.0"),
        ("fog", "3", 0, ValueError, "got '3'"),
        ("fog", True, 0, ValueError, "got True"),
        ("fog", 3, 1.5, TypeError, "expected a key of type str or int, got float"),
        ("fog", 3, None, TypeError, "got NoneType"),
    ],
)
def test_bad_arguments_are_named(name, severity, key, error, message):
    with pytest.raises(error, match=message):
        apply(photo(), name, severity, key)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "at least 1x1 pixels, got 0x5"),
        (Image.new("F", (2, 2)), "mode F"),
        (Image.fromarray(np.array([[-1, 70000]], np.int32)), "expected values in 0 to 65535, got -1 to 70000"),
    ],
    ids=["empty", "float", "int32"],
)
def test_images_without_defined_levels_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        apply(image, "contrast", 1, 0)


def test_numpy_integers_are_integers():
    same = apply(photo(), "fog", np.int64(3), np.int32(7))
    assert same.tobytes() == apply(photo(), "fog", 3, 7).tobytes()


# Textures


def test_ice_is_the_stated_colour_and_never_repeats_a_window():
    for window, look in enumerate(textures.WINDOWS):
        texture = textures.ice(window)
        assert texture.mean(axis=(0, 1)) == pytest.approx(look.colour, abs=1)
        assert texture.mean(axis=2).std() == pytest.approx(look.spread, abs=1.5)
        assert not texture.flags.writeable


@pytest.mark.parametrize("size", [(40, 50), (576, 768), (2000, 3), (3, 2000)], ids=str)
def test_ice_covers_any_canvas(size):
    assert textures.ice_crop(*size, np.random.default_rng(0)).shape == (*size, 3)


def square_plasma(size, decay, rng):
    """Diamond-square on a torus as it was drawn before there were strips: every step on the whole square."""
    grid, amplitude = np.zeros((1, 1), np.float32), 100.0
    while len(grid) < size:
        grid = textures.refine(grid, amplitude**2, rng)
        amplitude /= decay
    grid -= grid.min()
    return grid / grid.max()


def test_a_square_cloud_is_the_same_to_the_bit():
    for size in (2, 64, 512):
        made = textures.plasma(size, size, 1.7, np.random.default_rng(1))
        assert np.array_equal(made, square_plasma(size, 1.7, np.random.default_rng(1)))


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_cloud_is_the_originals_square_on_every_usual_canvas(height, width):
    rows, columns = shifts.cloud_size(height, width)
    assert rows >= height
    assert columns >= width
    assert rows * columns <= max(16 * height * width, 4)
    if max(height, width) <= 4 * min(height, width) and height * width > 1:
        assert rows == columns
        assert rows < max(2 * max(height, width), 3)


def test_a_strip_varies_along_its_whole_length_as_a_square_does():
    rough = [textures.plasma(size, 1024, 1.7, np.random.default_rng(2))[0] for size in (2, 1024)]
    assert [(line.min() >= 0, line.max() <= 1, len(line)) for line in rough] == [(True, True, 1024)] * 2
    halves = rough[0].reshape(2, 512)
    assert np.abs(halves[0] - halves[1]).mean() > 0.05
    steps = [np.abs(np.diff(line)).mean() / np.ptp(line) for line in rough]
    assert steps[0] == pytest.approx(steps[1], rel=0.5)


def test_plasma_wraps_fills_its_range_and_is_rougher_for_a_smaller_decay():
    def steps(field):
        return np.abs(np.diff(field, axis=0)).mean()

    smooth, rough = (textures.plasma(128, 128, decay, np.random.default_rng(3)) for decay in (3.0, 1.4))
    assert smooth.shape == (128, 128)
    assert (smooth.min(), smooth.max()) == (0, 1)
    assert steps(rough) > 2 * steps(smooth)
    assert np.abs(smooth[0] - smooth[-1]).mean() < 3 * steps(smooth)
