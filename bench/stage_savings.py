"""How many images does a study in stages ask about, and what does it find, where the truth is known?

    python -m bench.stage_savings [--images 1500] [--studies 200] [--margin 0.02] [--tests 4]

A comparison under shift is drawn again and again: images of 1 to 13 expressions (RefCOCO+ has 7.2 on average), 12 % of
which the other arm answers otherwise, with a correlation of 0.05 within an image, as `study plan` states it. Its test
is at Holm's first step of so many. Printed are, for each true difference and rule, how often it is decided as it should
be, and the mean share of the images that it takes; `one look` is a study without stages.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import numpy as np

from bench.reporting import markdown
from lmms_plugin.analysis.findings import EQUIVALENT, OPEN, SHOWN
from lmms_plugin.metrics._inputs import Floats
from lmms_plugin.study.verdicts.boundaries import ANY_TIME, PLANNED, AnyTime, ComparisonEvidence, Planned, StoppingRule
from lmms_plugin.study.verdicts.decisions import UNDER_SHIFT
from lmms_plugin.study.verdicts.pilot import CORRELATION, VARIANCES
from lmms_plugin.study.verdicts.stages import first_stage
from lmms_plugin.utils import image_slices

LARGEST, LEVEL = 13, 0.95
TRUTHS = (0.0, 0.01, 0.03, 0.05, 0.1)
FAMILY = ("model", UNDER_SHIFT)


def drawn(random: np.random.Generator, images: int, truth: float) -> tuple[Floats, Floats]:
    """Draw a comparison: sums of differences and numbers of documents of each image."""
    flipped, strength = VARIANCES[UNDER_SHIFT], 1.0 / CORRELATION - 1.0
    sizes = random.integers(1, LARGEST + 1, size=images)
    rates = random.beta(strength * flipped, strength * (1.0 - flipped), size=images)
    changed = random.binomial(sizes, rates)
    return 2.0 * random.binomial(changed, 0.5 + truth / flipped / 2.0) - changed, sizes.astype(np.float64)


def followed(rule: StoppingRule, stages: tuple[int, ...], sums: Floats, sizes: Floats, tests: int) -> tuple[str, int]:
    """Return the finding of a comparison and the images it took."""
    for stage, images in enumerate(stages):
        known = ComparisonEvidence(sums[:images], sizes[:images], (), 1.0, FAMILY)
        finding = rule.judge(stage, {"it": known}, {FAMILY: tests})["it"].finding
        if finding != OPEN:
            return finding, images
    return OPEN, stages[-1]


def rules(images: int, margin: float, tests: int) -> Mapping[str, tuple[StoppingRule, tuple[int, ...]]]:
    """Return the rules that are compared, with their stages."""
    stages, often = (image_slices.stages(images, first_stage(images, name)) for name in (PLANNED, ANY_TIME))
    return {
        "one look": (Planned(LEVEL, margin, (images,)), (images,)),
        PLANNED: (Planned(LEVEL, margin, stages), stages),
        ANY_TIME: (AnyTime(LEVEL, margin, tests, LARGEST), often),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--tests", type=int, default=4)
    options = parser.parse_args()
    compared = rules(options.images, options.margin, options.tests)
    rows = []
    for truth in TRUTHS:
        random = np.random.default_rng(0)
        samples = [drawn(random, options.images, truth) for _ in range(options.studies)]
        row = [f"{100 * truth:g}"]
        for rule, stages in compared.values():
            found = [followed(rule, stages, *sample, options.tests) for sample in samples]
            right = np.mean([finding == (EQUIVALENT if truth < options.margin else SHOWN) for finding, _ in found])
            share = np.mean([images for _, images in found]) / options.images
            row.append(f"{100 * right:.0f} %, {100 * share:.0f} %")
        rows.append(tuple(row))
    heads = ("true difference, points", *(f"{name}: decided rightly, images asked" for name in compared))
    print(*markdown(heads, rows), sep="\n")


if __name__ == "__main__":
    main()
