"""The learned confidence itself: what it learns, when it stops, what its file holds."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from lmms_plugin import metrics
from lmms_plugin.selector.features import FeatureOrigin, Features
from lmms_plugin.selector.network import Selector, SelectorSettings, fit, held_out_rows

ORIGIN = FeatureOrigin("f" * 64, {"method": "rtn", "plan": {"language": {"bits": 4}}}, -1)
WIDTH = 6
QUICK = SelectorSettings(hidden=32, lr=3e-3, epochs=40)


def planted(n=1200, seed=0, per_image=4):
    """Answers whose chance to be right is written into two hidden units; their own probability says nothing."""
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, WIDTH, generator=random) for _ in range(3)]
    chance = torch.sigmoid(2.5 * parts[0][:, 1] - 2.5 * parts[2][:, 3])
    right = (torch.rand(n, generator=random) < chance).double()
    features = Features(*parts, -torch.rand(n, generator=random))
    return features, right.numpy(), [f"image{k // per_image}" for k in range(n)], chance.double().numpy()


def train(data, settings=QUICK, **changes):
    features, right, images, _ = data
    about = {"origin": ORIGIN, "predicts": "right", "data": {"tasks": ["toy"]}, **changes}
    return fit(features, right, images, settings, **about)


@pytest.fixture(scope="module")
def trained():
    return train(planted())


def test_what_separates_right_from_wrong_is_learnt_for_new_images(trained):
    features, right, _, chance = planted(seed=1)
    confidence = trained.confidence(features)
    best = metrics.auroc(chance, right)
    assert metrics.auroc(confidence, right) > best - 0.03
    assert metrics.auroc(np.exp(features.logprob.numpy()), right) < 0.55
    assert metrics.ece(confidence, right) < 0.08
    assert confidence.dtype == np.float64
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_soft_scores_are_regressed_not_rounded():
    features, _, images, chance = planted()
    confidence = train((features, chance, images, None)).confidence(planted(seed=1)[0])
    assert np.abs(confidence - planted(seed=1)[3]).mean() < 0.06


def test_training_begins_at_the_probability_scaled_after_platt():
    """With nothing to learn from hidden states and few answers, the probability still ranks as it did."""
    features, _, images, _ = planted(n=160)
    chance = 1 / (1 + np.exp(-8 * (features.logprob.numpy() + 0.5)))
    right = (np.random.default_rng(0).random(160) < chance).astype(float)
    selector = train((features, right, images, None), SelectorSettings(hidden=64, lr=1e-2))
    inside = ~held_out_rows(images, SelectorSettings()).numpy()
    logprob = features.logprob.numpy()[:, None]
    alone = LogisticRegression(C=np.inf).fit(logprob[inside], right[inside])
    first = selector.record.epochs[0]
    for part, loss in ((inside, first.training), (~inside, first.held_out)):
        assert loss == pytest.approx(log_loss(right[part], alone.predict_proba(logprob[part])[:, 1]), abs=1e-3)
    assert selector.record.epochs[selector.record.best].held_out <= first.held_out
    assert metrics.auroc(selector.confidence(features), right) > metrics.auroc(logprob[:, 0] + 1, right) - 0.02


def test_the_same_seed_makes_the_same_file_and_another_one_another(tmp_path, trained):
    for name, selector in {
        "a": trained,
        "b": train(planted()),
        "c": train(planted(), SelectorSettings(hidden=32, lr=3e-3, epochs=40, seed=1)),
    }.items():
        selector.save(tmp_path / name)
    contents = {name: (tmp_path / name).read_bytes() for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]


def test_training_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(planted(n=80), SelectorSettings(hidden=4, epochs=1))
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_file_brings_back_the_selector_and_its_history(tmp_path, trained):
    trained.save(tmp_path / "s.safetensors")
    loaded = Selector.load(tmp_path / "s.safetensors")
    features, _, images, _ = planted()
    np.testing.assert_array_equal(loaded.confidence(features), trained.confidence(features))
    assert loaded.record == trained.record
    assert loaded.record.origin == ORIGIN
    assert loaded.record.data["tasks"] == ["toy"]
    assert loaded.record.data["answers"] == 1200
    assert sum(loaded.record.images) == 300
    assert loaded.seen_among([*images, "another"]) == sorted(set(images))
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_training_stops_when_held_out_images_no_longer_gain_and_the_best_epoch_is_kept():
    features, _, images, _ = planted(n=120)
    noise = np.random.default_rng(0).integers(0, 2, 120).astype(float)
    settings = SelectorSettings(hidden=64, lr=1e-2, epochs=60, patience=4)
    selector = train((features, noise, images, None), settings)
    losses = [epoch.held_out for epoch in selector.record.epochs]
    assert len(losses) < 60
    assert len(losses) - 1 - selector.record.best == 4
    assert losses[selector.record.best] == min(losses)
    assert selector.record.epochs[-1].training < selector.record.epochs[0].training
    apart = held_out_rows(images, settings).numpy()
    kept = selector.confidence(features)[apart]
    right = noise[apart]
    loss = -np.mean(right * np.log(kept) + (1 - right) * np.log(1 - kept))
    assert loss == pytest.approx(min(losses), abs=1e-5)


def test_answers_about_an_image_are_all_trained_on_or_all_held_out():
    images = [f"image{k % 50}" for k in range(1000)]
    apart = held_out_rows(images, SelectorSettings(held_out=0.2)).tolist()
    by_image = {image: {out for other, out in zip(images, apart, strict=True) if other == image} for image in images}
    assert all(len(sides) == 1 for sides in by_image.values())
    assert sum(sides == {True} for sides in by_image.values()) == 10
    assert apart != held_out_rows(images, SelectorSettings(held_out=0.2, seed=1)).tolist()
    backwards = held_out_rows(images[::-1], SelectorSettings(held_out=0.2)).tolist()
    assert backwards == apart[::-1]


def test_what_is_constant_in_training_does_no_harm():
    features, right, images, chance = planted()
    dead = features._replace(question=torch.full_like(features.question, 7.0))
    confidence = train((dead, right, images, chance)).confidence(dead)
    assert np.isfinite(confidence).all()
    assert metrics.auroc(confidence, right) > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"target": [1.0] * 8}, "better and worse answers to learn from, but all score 1", id="all right"),
        pytest.param({"target": [1.5, *[0.0] * 7]}, r"scores in \[0, 1\]", id="no score"),
        pytest.param({"target": [0.0, 1.0]}, "as many scores and images as answers, got 8, 2, 8", id="too few"),
        pytest.param({"images": ["one"] * 8}, "at least 2 images", id="one image"),
        pytest.param({"logprob": torch.full((8,), torch.nan)}, "finite features", id="nan"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(change, message):
    features, _, _, _ = planted(n=8)
    if "logprob" in change:
        features = features._replace(logprob=change["logprob"])
    target = change.get("target", [0.0, 1.0] * 4)
    images = change.get("images", [str(k) for k in range(8)])
    with pytest.raises(ValueError, match=message):
        fit(features, target, images, QUICK, origin=ORIGIN, predicts="right", data={})


def test_features_of_another_width_or_not_finite_are_refused(trained):
    features = planted(n=4)[0]
    with pytest.raises(ValueError, match="expected 19 features per answer, got 16"):
        trained.confidence(features._replace(image=features.image[:, :3]))
    with pytest.raises(ValueError, match="expected finite features"):
        trained.confidence(features._replace(first=features.first / 0))


def test_files_that_are_no_selector_are_refused(tmp_path, trained):
    trained.save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(ValueError, match="half is damaged"):
        Selector.load(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Selector.load(tmp_path / "none")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="was not written by"):
        Selector.load(tmp_path / "other")


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"held_out": 0.0}, {"held_out": 1.0}, {"dropout": 1.0}, {"lr": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelectorSettings(**wrong)
