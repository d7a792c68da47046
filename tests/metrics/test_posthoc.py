"""Post-hoc calibrators: recovered parameters, agreement with scikit-learn and netcal, and no leakage."""

import numpy as np
import pytest
from netcal.scaling import BetaCalibration
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from lmms_plugin.metrics import ece, nll
from lmms_plugin.metrics.posthoc import CALIBRATORS, Beta, Isotonic, Platt, Temperature

KINDS = pytest.mark.parametrize("kind", CALIBRATORS.values(), ids=CALIBRATORS)


def records(n=4000, seed=0, truth=lambda c: c**2):
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1.2, n)
    return confidence, (rng.random(n) < truth(confidence)).astype(float)


def images(n, name):
    return [f"{name}_{k // 4}" for k in range(n)]


def fitted(kind, **more):
    confidence, outcome = records(**more)
    return kind.fit(confidence, outcome, images(confidence.size, "fit"), split="val")


@KINDS
def test_calibrates_records_it_has_not_seen(kind):
    confidence, outcome = records(seed=1)
    calibrated = fitted(kind).apply(confidence, images(4000, "test"))
    assert ece(confidence, outcome) > 0.15
    # A temperature cannot move 0.5, and confidence² is 0.25 there.
    assert ece(calibrated, outcome) < (0.14 if kind is Temperature else 0.03)
    assert nll(calibrated, outcome) < nll(confidence, outcome)


@KINDS
def test_never_turns_the_order_round(kind):
    grid = np.linspace(0, 1, 501)
    values = fitted(kind).apply(grid, images(501, "grid"))
    assert np.all(np.diff(values) >= 0)
    assert values.min() >= 0
    assert values.max() <= 1


@KINDS
def test_anticorrelated_confidence_becomes_constant_and_not_reversed(kind):
    values = fitted(kind, truth=lambda c: 1 - c).apply([0.1, 0.5, 0.9], ["a", "b", "c"])
    assert np.all(np.diff(values) >= 0)
    if kind is not Temperature:
        assert np.ptp(values) < 0.05


@KINDS
def test_calibrated_records_stay_as_they_are(kind):
    grid = np.linspace(0.2, 0.98, 40)
    values = fitted(kind, n=40_000, truth=lambda c: c).apply(grid, images(40, "grid"))
    assert np.abs(values - grid).max() < 0.06


def test_parameters_are_recovered():
    temperature = fitted(Temperature, n=100_000, truth=lambda c: expit(logit(c) / 2.5))
    assert temperature.temperature == pytest.approx(2.5, rel=0.05)
    platt = fitted(Platt, n=100_000, truth=lambda c: expit(0.6 * logit(c) - 0.5))
    assert (platt.slope, platt.intercept) == pytest.approx((0.6, -0.5), abs=0.03)
    beta = fitted(Beta, n=100_000, truth=lambda c: expit(1.5 * np.log(c) - 0.4 * np.log1p(-c) + 0.2))
    assert (beta.a, beta.b, beta.intercept) == pytest.approx((1.5, 0.4, 0.2), abs=0.1)


def test_platt_is_logistic_regression_on_the_logit():
    confidence, outcome = records()
    reference = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(confidence)[:, None], outcome)
    ours = fitted(Platt)
    assert (ours.slope, ours.intercept) == pytest.approx((reference.coef_[0, 0], reference.intercept_[0]), abs=1e-4)


def test_isotonic_is_scikit_learns():
    confidence, outcome = records()
    confidence = np.round(confidence, 2)
    reference = IsotonicRegression(out_of_bounds="clip").fit(confidence, outcome)
    ours = Isotonic.fit(confidence, outcome, images(4000, "fit"), split="val")
    grid = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(ours.apply(grid, images(1001, "grid")), reference.predict(grid), atol=1e-12)


def test_beta_fits_at_least_as_well_as_netcals():
    confidence, outcome = records()
    reference = BetaCalibration()
    reference.fit(confidence, outcome)
    ours = fitted(Beta).apply(confidence, images(4000, "test"))
    theirs = reference.transform(confidence)
    assert nll(ours, outcome) <= nll(theirs, outcome) + 1e-7
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@KINDS
def test_soft_targets_are_fitted_by_their_mean(kind):
    confidence = np.tile([0.3, 0.9], 500)
    outcome = np.tile([0.2, 0.6, 0.4, 0.8], 250)
    calibrator = kind.fit(confidence, outcome, images(1000, "fit"), split="val")
    values = calibrator.apply([0.3, 0.9], ["a", "b"])
    if kind is Temperature:
        assert values[1] > 0.5 > values[0]
    else:
        assert values == pytest.approx([0.3, 0.7], abs=1e-4)


@KINDS
def test_certain_confidences_stay_finite(kind):
    confidence = np.tile([0.0, 1e-30, 0.5, 1.0], 100)
    outcome = np.tile([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0], 50)
    values = kind.fit(confidence, outcome, images(400, "fit"), split="val").apply([0.0, 1.0], ["a", "b"])
    assert np.all((values >= 0) & (values <= 1))


@KINDS
def test_images_that_were_fitted_on_are_refused(kind):
    calibrator = fitted(kind)
    with pytest.raises(ValueError, match=r"has not seen, got 1 of its 1000 from split 'val', e\.g\. 'fit_3'"):
        calibrator.apply([0.5, 0.6], ["test_1", "fit_3"])
    with pytest.raises(ValueError, match="one image per confidence"):
        calibrator.apply([0.5, 0.6], ["test_1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Platt.fit([0.5, 0.6], [1, 1], ["a", "b"], split="val"), "right and wrong"),
        (lambda: Platt.fit([0.5, 0.6], [1, 0], ["a"], split="val"), "one image per record"),
        (lambda: Platt.fit([0.5, np.nan], [1, 0], ["a", "b"], split="val"), "confidence"),
        (lambda: fitted(Beta).apply([1.2], ["a"]), "confidence"),
    ],
    ids=["all right", "images", "nan", "out of range"],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
