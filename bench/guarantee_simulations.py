"""Guarantees and intervals under a known truth: how often they are kept, at 30, 150 and 600 images.

    python -m bench.guarantee_simulations [--repeats N] [--tables NAME ...] [--json FILE]

No model is run. Every table draws images of unequal numbers of answers whose errors go together, again and again, does
on each draw what a command does with a run, and compares with the truth: `thresholds` (`lmms-plugin guarantee`),
`margins` (`--contain`), `shifts` (`--reweigh`) and `divergences` (intervals of `lmms-plugin distance`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.reporting import Row, markdown, write
from lmms_plugin import metrics
from lmms_plugin.metrics.bootstrap import Clusters, bootstrap, interval
from lmms_plugin.metrics.guarantees import box_margins, covariate_shift, thresholds
from lmms_plugin.metrics.guarantees.risk_bounds import ImageLosses
from lmms_plugin.metrics.guarantees.thresholds import NOTHING, Promise, ScoredDocuments
from lmms_plugin.metrics.sums import KnownMeans

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
SIZES = (30, 150, 600)
REPEATS = 400
LARGEST = 6
"""Answers of an image at most; every number from 1 on is as likely."""
MANY = 100_000
"""Images of the truth."""
FEATURES = 8
HARD = 0.5
"""Value of the first feature of an image from which its answers are wrong more often."""


# Thresholds


def error(confidence: Floats) -> Floats:
    """Probability of error: it rises again at the top, so that the risk of thresholds is not monotone."""
    return np.where(confidence > 0.9, 0.07, np.clip(0.9 - confidence, 0.01, 0.9))


def cluster(random: np.random.Generator, images: int, most: int = LARGEST) -> Indices:
    """Image of each answer."""
    return np.repeat(np.arange(images), random.integers(1, most + 1, images))


def lost(random: np.random.Generator, wrong: Floats, image: Indices) -> Floats:
    """Losses with these probabilities; every second answer of an image shares its luck with others of it."""
    luck = np.where(
        random.random(image.size) < 0.5, random.random(int(image.max()) + 1)[image], random.random(image.size)
    )
    return (luck < wrong).astype(float)


def drawn(
    random: np.random.Generator,
    images: int,
    *,
    tied: bool = False,
    shift: float = 0.0,
    harder: float = 0.0,
    most: int = LARGEST,
) -> tuple[ScoredDocuments, Floats, Floats]:
    """Images of 1 to `most` documents, with the covariate of each image and the probability of error of each document.

    Confidences and errors of an image go together. Images with a low covariate are harder than their confidence says.
    """
    image = cluster(random, images, most)
    covariate = random.normal(shift, 1.0, images)
    confidence = 1.0 / (1.0 + np.exp(-0.6 * covariate[image] - 0.8 * random.normal(size=image.size) - 1.0))
    confidence = np.round(confidence, 1) if tied else confidence
    wrong = error(confidence) + harder * (covariate[image] < -0.5)
    return ScoredDocuments(confidence, lost(random, wrong, image), image), covariate, wrong


class Truth:
    """True risks of all thresholds, from very many images."""

    def __init__(self, weigh: Callable[[Floats], Floats] | None = None, **options: float) -> None:
        documents, covariate, wrong = drawn(np.random.default_rng(99), MANY, **options)  # type: ignore[arg-type]
        order = np.argsort(-documents.confidence, kind="stable")
        weight = np.ones(MANY) if weigh is None else weigh(covariate)
        of_each = weight[documents.image][order]
        self.ranked = documents.confidence[order]
        self.lost, self.counted = np.cumsum(of_each * wrong[order]), np.cumsum(of_each)

    def accepted(self, threshold: float) -> tuple[float, float]:
        """Risk among what is accepted, and share of all that is accepted and wrong."""
        count = int(np.searchsorted(-self.ranked, -threshold, side="right"))
        if not count:
            return 0.0, 0.0
        return self.lost[count - 1] / self.counted[count - 1], self.lost[count - 1] / self.counted[-1]


def thresholds_rows(repeats: int) -> Iterator[Row]:
    """How often a promise of 10 % is broken, of each kind of threshold, and what it accepts."""
    for tied in (False, True):
        truth = Truth(tied=tied)
        for images in SIZES:
            random, broken, covered = np.random.default_rng(images), np.zeros(4), np.zeros(4)
            for _ in range(repeats):
                documents, *_ = drawn(random, images, tied=tied)
                for k, (threshold, of) in enumerate(_chosen(documents)):
                    broken[k] += truth.accepted(threshold)[of] > RISK
                    covered[k] += documents.accepted(threshold).mean()
            yield {"tied": tied, "images": images, "broken": broken / repeats, "accepted": covered / repeats}


RISK = 0.1
THRESHOLDS = ("observed risk", "guaranteed", "images alike", "all answers")
"""Threshold with this risk on the images it is chosen on; of `selective_threshold`, also per image; of
`monotone_threshold`, whose risk is of all answers."""


def _chosen(documents: ScoredDocuments) -> Iterator[tuple[float, int]]:
    """Yield thresholds, and which of the truth's risks each is of."""
    pilot = documents.image % 4 == 0
    yield metrics.threshold_at_risk(documents.confidence, 1.0 - documents.loss, RISK), 0
    yield thresholds.selective_threshold(documents, pilot, Promise(RISK, largest=LARGEST)).threshold, 0
    # Numbers of answers and errors are independent, so that risks per image and per answer are hardly different.
    yield thresholds.selective_threshold(documents, pilot, Promise(RISK, largest=LARGEST, per_image=True)).threshold, 0
    yield thresholds.monotone_threshold(documents, Promise(RISK, largest=LARGEST)).threshold, 1


def p_rows(repeats: int) -> Iterator[Row]:
    """How often a bound's p-value is at most 5 % where the risk is just the tested one."""
    for images in SIZES:
        losses = losses_at_risk(np.random.default_rng(images), images, repeats)
        shares = {
            f"{bound}, {side}": float((p <= 0.05).mean())
            for bound in ("betting", "hoeffding-bentkus")
            for side, p in (("below", losses.p_below(RISK, bound)), ("above", losses.p_above(RISK, bound)))
        }
        yield {"images": images, **shares}


def losses_at_risk(random: np.random.Generator, images: int, repeats: int) -> ImageLosses:
    """Draws of images whose risk is just `RISK`, with 0 to `LARGEST` accepted answers that are wrong together."""
    sizes = random.integers(0, LARGEST + 1, (repeats, images)).astype(float)
    share = random.beta(4 * RISK, 4 * (1 - RISK), (repeats, images))
    return ImageLosses(random.binomial(sizes.astype(int), share).astype(float), sizes, LARGEST)


# Margins


def boxes(random: np.random.Generator, images: int) -> tuple[Floats, Indices]:
    """True boxes around predicted ones, off by an amount that the boxes of an image share in part; many tie."""
    image = cluster(random, images)
    return np.round(np.abs(random.normal(0.0, 0.1, images)[image] + random.normal(0.0, 0.05, image.size)), 2), image


def margin_rows(repeats: int) -> Iterator[Row]:
    """How often boxes of new images contain the true ones, of 90 % promised."""
    for images in SIZES:
        random = np.random.default_rng(images)
        kept = np.array([contained(random, images) for _ in range(repeats)])
        yield {"images": images, "contained": kept.mean(), "error": kept.std() / np.sqrt(repeats)}


def contained(random: np.random.Generator, images: int, probability: float = 0.9, new: int = 20) -> float:
    """Choose a margin on images and return the share of boxes of new images that contain the true one, images alike."""
    scores, image = boxes(random, images + new)
    known = image < images
    found = box_margins.box_margin(scores[known], image[known], probability)
    index = image[~known] - images
    return float((np.bincount(index, scores[~known] <= found.margin) / np.bincount(index)).mean())


# Covariate shift


class World(NamedTuple):
    """Where answers come from, and what changes under shift.

    Attributes:
        seen: How much of the first feature confidence shows.
        moved: Change of the first feature's mean under shift.
        worse: Change of the probability of error that no feature and no confidence tells of.
    """

    seen: float
    moved: float
    worse: float = 0.0


WORLDS = {
    "features alone": World(0.0, 0.75),
    "features and confidences": World(-0.6, 0.75),
    "neither": World(0.0, 0.0, 0.1),
}
"""What shows a shift → how it comes about. In all of them images whose first feature is high are harder."""
HARDER = 0.25
PROMISED = 0.3
HEAVIEST = 4.0


class ShiftedImages(NamedTuple):
    """Images of 1 to `LARGEST` answers, whose confidences tie.

    Attributes:
        documents: Their answers.
        features: Shape (images, FEATURES).
        wrong: Probability of error of each answer.
    """

    documents: ScoredDocuments
    features: Floats
    wrong: Floats

    def told(self) -> Floats:
        """What logs tell of each image: means of two confidences, shape (images, 2)."""
        confidence, image = self.documents.confidence, self.documents.image
        return np.stack([np.bincount(image, c) / np.bincount(image) for c in (confidence, confidence**4)], axis=1)


def shifted_images(random: np.random.Generator, images: int, world: World, *, shifted: bool) -> ShiftedImages:
    """Draw images of a world, before or under its shift."""
    image = cluster(random, images)
    features = random.normal(size=(images, FEATURES))
    features[:, 0] += world.moved * shifted
    of_image = world.seen * features[:, 0] + np.sqrt(0.36 - world.seen**2) * random.normal(size=images)
    confidence = np.round(1.0 / (1.0 + np.exp(-1.0 - of_image[image] - 0.8 * random.normal(size=image.size))), 2)
    wrong = error(confidence) + HARDER * (features[image, 0] > HARD) + world.worse * shifted
    return ShiftedImages(ScoredDocuments(confidence, lost(random, wrong, image), image), features, wrong)


class RiskUnderShift:
    """True risk of thresholds under a world's shift, images alike; each threshold is worked out once."""

    def __init__(self, world: World) -> None:
        self._images = shifted_images(np.random.default_rng(98), MANY, world, shifted=True)
        self._known: dict[float, float] = {}

    def of(self, threshold: float) -> float:
        """Risk of what a threshold accepts of a random image; 0 where that is nothing."""
        if threshold not in self._known:
            documents = self._images.documents
            accepted = documents.accepted(threshold)
            counted = np.bincount(documents.image, accepted, minlength=MANY)
            errors = np.bincount(documents.image, accepted * self._images.wrong, minlength=MANY)
            there = counted > 0
            self._known[threshold] = float((errors[there] / counted[there]).mean()) if there.any() else 0.0
        return self._known[threshold]


WEIGHTS = ("none", "by confidences", "by features", "true")


def weights_of(source: ShiftedImages, target: ShiftedImages, world: World) -> Iterator[tuple[Floats | None, float]]:
    """Yield weights of the source's images of each kind, None for none, and the heaviest; infinite for no overlap."""
    yield None, 1.0
    for ours, theirs in ((source.told(), target.told()), (source.features, target.features)):
        ratio = covariate_shift.density_ratio(ours, theirs)
        yield ratio.weights, ratio.heaviest if ratio.overlaps else np.inf
    exact = np.exp(world.moved * source.features[:, 0] - world.moved**2 / 2)
    heaviest = HEAVIEST if world.moved else 1.0
    yield np.minimum(exact, heaviest), heaviest


def shift_rows(repeats: int) -> Iterator[Row]:
    """How often a promise of 30 % is broken under shift, and how often there is one, with weights of each kind."""
    promise = Promise(PROMISED, largest=LARGEST, per_image=True)
    for name, world in WORLDS.items():
        truth = RiskUnderShift(world)
        for images in SIZES:
            random, broken, promised, left = np.random.default_rng(images), *np.zeros((3, len(WEIGHTS)))
            for _ in range(repeats):
                source, target = (shifted_images(random, images, world, shifted=shifted) for shifted in (False, True))
                pilot = source.documents.image % 4 == 0
                for k, (weights, heaviest) in enumerate(weights_of(source, target, world)):
                    chosen = NOTHING
                    if np.isfinite(heaviest):
                        chosen = thresholds.selective_threshold(
                            source.documents, pilot, promise, weights=weights, heaviest=heaviest
                        ).threshold
                    promised[k] += chosen < NOTHING
                    broken[k] += truth.of(chosen) > PROMISED
                    left[k] += images if weights is None else covariate_shift.effective_images(weights)
            counts = broken / repeats, promised / repeats, left / repeats
            yield {
                "shift shows in": name,
                "images": images,
                **dict(zip(("broken", "promised", "left"), counts, strict=True)),
            }


# Divergences


def divergences(images: int, random: np.random.Generator) -> tuple[Floats, Indices]:
    """Divergences of some images' answers: unequal clusters, skewed, alike within an image, and many exactly equal."""
    sizes = random.geometric(0.35, images)
    index = np.repeat(np.arange(images), sizes)
    of_image = random.normal(0, 0.6, images)[index]
    values = np.exp(of_image + random.normal(0, 0.6, index.size))
    values[random.random(index.size) < 0.4] = 0.0
    return values, index


MEAN_DIVERGENCE = 0.6 * np.exp((0.6**2 + 0.6**2) / 2)


def divergence_rows(repeats: int) -> Iterator[Row]:
    """How often a 95 % interval of resampled images holds the true mean."""
    for images in SIZES:
        yield {"images": images, "covered": divergence_coverage(images, repeats)}


def divergence_coverage(images: int, repeats: int, resamples: int = 200) -> float:
    """Share of draws whose 95 % interval holds the true mean."""
    random, covered = np.random.default_rng(7), 0
    for _ in range(repeats):
        values, index = divergences(images, random)
        (draws,) = bootstrap([KnownMeans({"kl": values}, Clusters(index, images))], images, resamples=resamples)
        low, high = interval(*draws.of("kl"))
        covered += low <= MEAN_DIVERGENCE <= high
    return covered / repeats


# What is printed


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _thresholds_table(rows: Iterable[Row]) -> Iterator[str]:
    lines = []
    for row in rows:
        both = zip(row["broken"], row["accepted"], strict=True)
        told = (f"{_percent(broken)} ({100 * accepted:.0f})" for broken, accepted in both)
        lines.append((f"{row['images']}{', tied' if row['tied'] else ''}", *told))
    yield from markdown(("images", *THRESHOLDS), lines)


def _shifts_table(rows: Iterable[Row]) -> Iterator[str]:
    lines = []
    for row in rows:
        parts = zip(row["broken"], row["promised"], row["left"], strict=True)
        told = (f"{_percent(broken)} of {100 * promised:.0f} ({left:.0f})" for broken, promised, left in parts)
        lines.append((row["shift shows in"], str(row["images"]), *told))
    yield from markdown(("shift shows in", "images", *WEIGHTS), lines)


def _plain_table(rows: Iterable[Row]) -> Iterator[str]:
    found = list(rows)
    names = [name for name in found[0] if name != "images"]
    yield from markdown(
        ("images", *names), [(str(row["images"]), *(_percent(row[name]) for name in names)) for row in found]
    )


Table = tuple[Callable[[int], Iterator[Row]], Callable[[Iterable[Row]], Iterator[str]], str]
TABLES: dict[str, Table] = {
    "thresholds": (
        thresholds_rows,
        _thresholds_table,
        "Draws in which a promise of 10 % is broken (share of the answers that is accepted), in percent:",
    ),
    "p": (p_rows, _plain_table, "Draws with a p-value of at most 5 % where the risk is the tested one, in percent:"),
    "margins": (margin_rows, _plain_table, "Boxes that contain the true one, of 90 % promised, in percent:"),
    "shifts": (
        shift_rows,
        _shifts_table,
        "Draws in which a promise of 30 % is broken `of` those with a promise, in percent of all (effective images):",
    ),
    "divergences": (divergence_rows, _plain_table, "95 % intervals that hold the true mean divergence, in percent:"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="draws of each line of a table")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    everything: list[Row] = []
    for name in options.tables:
        rows_of, shown, about = TABLES[name]
        rows = list(rows_of(options.repeats))
        print("\n".join([f"{about}\n", *shown(rows), ""]))
        sys.stdout.flush()
        plain = [{key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in row.items()} for row in rows]
        everything += [{"case": name, "ratio": None, **row} for row in plain]
    write(options.json, everything)


if __name__ == "__main__":
    main()
