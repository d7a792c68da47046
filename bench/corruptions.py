"""Time and strength of every corruption, beside imagecorruptions where that has the same one.

    python -m bench.corruptions [--repeats N] [--json FILE]
    python -m bench.corruptions --strength [--json FILE]      # the table of docs/corruptions.md

Time: a 640×480 photograph, processor time of one thread (OpenCV held to one), the median over repeats, severity 3. The
worst of the five severities is stated too, because the limit of 60 ms holds for each. A ratio above 1 means that ours
is faster. Tables and ice textures are made on first use and kept; `first use` says what that costs once per process.

Strength: mean absolute difference to the clean picture in levels of 255, three photographs of 320×240, without a rim of
24 pixels; of the original once as it is and once against the clean picture moved, by whole pixels, to where that fits
best. What the two differ by is displacement, not damage.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import numpy.typing as npt
import PIL
import skimage.data
from PIL import Image

from bench.reporting import Row, machine, write
from lmms_plugin.shifts.image import corruptions, moving, textures
from lmms_plugin.shifts.severities import SEVERITIES

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers import imagecorruptions_reference

SEVERITY = 3
BUDGET_S = 3.0
STRENGTHS = (1, 3, 5)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
RIM = 24
REACH = {"centred_motion_blur": 11, "centred_glass_blur": 2}
"""How far, in pixels, the original may have moved the picture; the others are not moved, or move here as well."""
DRAWS = {"frost": 20, "fog": 20, "spatter": 5, "motion_blur": 20, "elastic_transform": 5}
"""Draws per photograph where one says little: which window, cloud, drops, direction; one draw of the others."""
MOVED = tuple(name for name, shift in moving.MOVING.items() if shift.kind == "corruption")

Pixels = npt.NDArray[np.float64]


def photograph() -> Image.Image:
    """A real scene, 640×480 RGB."""
    return Image.fromarray(skimage.data.coffee()).resize((640, 480))


def applied(image: Image.Image, name: str, severity: int, key: int) -> Image.Image:
    """The picture under one of ours, on its own canvas."""
    return (moving if name in MOVED else corruptions).apply(image, name, severity, key)


def original(name: str) -> str:
    """The name of a corruption in imagecorruptions."""
    return name.removeprefix("centred_")


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median processor time of one call after a first one, which counts only if it alone exceeds the budget."""
    times: list[float] = []
    while len(times) <= repeats and sum(times) < BUDGET_S:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times[1:] or times)


def first_use() -> float:
    """Processor time of drawing all frosted windows, milliseconds."""
    textures.ice.cache_clear()
    start = time.process_time()
    for window in range(len(textures.WINDOWS)):
        textures.ice(window)
    return 1000 * (time.process_time() - start)


def measure(name: str, image: Image.Image, theirs: ModuleType, repeats: int) -> Row:
    """One line of the table: ours at severity 3 and at the slowest severity, imagecorruptions at severity 3."""

    def timed(image: Image.Image, name: str, severity: int) -> Image.Image:
        moving.movement.cache_clear()
        return applied(image, name, severity, 0)

    by_severity = [milliseconds(lambda s=s: timed(image, name, s), repeats) for s in SEVERITIES]
    ours, baseline = by_severity[SEVERITY - 1], None
    if hasattr(theirs, original(name)):
        baseline = milliseconds(
            lambda: imagecorruptions_reference.corrupt(theirs, image, original(name), SEVERITY, 0), max(3, repeats // 3)
        )
    ratio = None if baseline is None else baseline / ours
    return {"case": name, "ms": ours, "worst_ms": max(by_severity), "baseline_ms": baseline, "ratio": ratio}


def difference(corrupted: Pixels, clean: Pixels, reach: int = 0) -> float:
    """Mean absolute difference, the least over all moves of the clean picture by up to `reach` pixels.

    Args:
        corrupted: (h, w, 3), levels of 255.
        clean: The same shape.
        reach: At most `RIM`, which is left out on every side.
    """
    inner = np.s_[RIM:-RIM, RIM:-RIM]
    moves = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    moved = (np.roll(clean, move, axis=(0, 1))[inner] for move in moves)
    return float(min(np.abs(corrupted[inner] - candidate).mean() for candidate in moved))


def strength(name: str, severity: int, theirs: ModuleType) -> Row:
    """One line of the table of strengths; None where the original has no such corruption."""
    found: dict[str, list[float]] = {"ours": [], "theirs": [], "theirs_in_place": []}
    for key, photograph_name in enumerate(PHOTOGRAPHS):
        image = Image.fromarray(getattr(skimage.data, photograph_name)()).convert("RGB").resize((320, 240))
        clean = np.asarray(image).astype(float)
        for draw in range(draws := DRAWS.get(name, 1)):
            seed = key * draws + draw
            found["ours"].append(difference(np.asarray(applied(image, name, severity, seed)).astype(float), clean))
            if hasattr(theirs, original(name)):
                other = imagecorruptions_reference.corrupt(theirs, image, original(name), severity, seed).astype(float)
                found["theirs"].append(difference(other, clean))
                found["theirs_in_place"].append(difference(other, clean, REACH.get(name, 0)))
    means = {column: statistics.mean(values) if values else None for column, values in found.items()}
    return {"case": name, "severity": severity, **means}


def strengths(theirs: ModuleType) -> list[Row]:
    """Prints the table of docs/corruptions.md as it is made, and returns its rows."""
    columns = ("theirs", "theirs_in_place", "ours")
    print("| corruption | original, severity 1 / 3 / 5 | original, put back in its place | here |\n|---|---|---|---|")
    rows: list[Row] = []
    for name in (*corruptions.SHIFTS, *MOVED):
        rows += (of_name := [strength(name, severity, theirs) for severity in STRENGTHS])
        cells = (
            " / ".join("-" if row[column] is None else f"{row[column]:.1f}" for row in of_name) for column in columns
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return rows


def total(rows: list[Row]) -> Row:
    """Sums over the corruptions that both have."""
    shared = [row for row in rows if row["baseline_ms"] is not None]
    ours, theirs = (sum(row[column] for row in shared) for column in ("ms", "baseline_ms"))
    return {"case": "sum of shared", "ms": ours, "worst_ms": None, "baseline_ms": theirs, "ratio": theirs / ours}


def line(row: Row) -> str:
    """One row as text; a dash where there is nothing to compare with."""
    cells = [f"{row[column]:10.1f}" if row[column] is not None else f"{'-':>10}" for column in list(row)[1:]]
    return f"{row['case']:<18}" + "".join(cells)


def main() -> None:
    """Prints the table; writes its rows where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--strength", action="store_true", help="differences to the clean picture instead of times")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    image, theirs = photograph(), imagecorruptions_reference.load()
    if arguments.strength:
        write(arguments.json, strengths(theirs))
        return
    print(f"{machine()}, OpenCV {cv2.__version__}, Pillow {PIL.__version__}")
    print(f"first use of frost: {first_use():.0f} ms")
    print(f"{'case':<18}{'ms':>10}{'worst ms':>10}{'theirs ms':>10}{'ratio':>10}")
    rows = []
    for name in (*corruptions.SHIFTS, *MOVED):
        rows.append(measure(name, image, theirs, arguments.repeats))
        print(line(rows[-1]), flush=True)
    shared = [row for row in rows if "glass_blur" not in row["case"]]
    rows.append(total(rows))
    print(line(rows[-1]))
    rows.append(total(shared) | {"case": "… without glass"})
    print(line(rows[-1]))
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
