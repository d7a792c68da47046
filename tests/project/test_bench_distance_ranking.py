"""The benchmark that ranks quantizers by distance: its tau, and what it finds where the order is known."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from bench.distance_ranking import ACCURACY, PerImage, models, ranking, ranking_table, taus

NAMES = (ACCURACY, "kl")


def planted(noise, quantizers=8, images=60, seed=0):
    """Quantizers of falling accuracy and growing divergence; both vary from image to image."""
    rng = np.random.default_rng(seed)
    quality = np.linspace(0.9, 0.2, quantizers)[:, None]
    right = rng.binomial(4, np.repeat(quality, images, axis=1))
    kl = 4 * np.clip(1 - quality + noise * rng.normal(size=(quantizers, images)), 0, None)
    return PerImage(np.stack([right, kl]).astype(float), np.full((2, quantizers, images), 4.0))


def test_tau_is_scipy_s_with_ties():
    rng = np.random.default_rng(1)
    scores, truth = rng.integers(0, 4, (9, 20)).astype(float), rng.integers(0, 4, 9).astype(float)
    expected = [kendalltau(column, truth).statistic for column in scores.T]
    assert taus(scores, truth) == pytest.approx(np.array(expected), nan_ok=True)


def test_a_distance_without_noise_needs_few_images_and_labels_need_more():
    found = {size: [float(np.mean(tau)) for tau in both] for size, both in ranking(planted(0.0), NAMES)}
    accuracy, kl = zip(*(found[size] for size in sorted(found)), strict=True)
    assert min(kl) > 0.99
    assert accuracy[0] < 0.9 < accuracy[-1]
    assert list(accuracy) == sorted(accuracy)
    assert max(found) == 60


def test_the_table_has_a_mean_and_an_interval_for_each_measure():
    per_image = planted(0.3)
    stacked = PerImage(*(np.concatenate([part] * 3) for part in per_image))
    lines = list(ranking_table(stacked))
    assert len(lines) == 2 + 6
    assert lines[2].count("[") == 6


def test_every_quantizer_has_a_folder_of_its_own():
    folders = [folder for folder, *_ in models()]
    assert len(set(folders)) == len(folders) == 15
