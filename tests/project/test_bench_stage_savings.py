"""The bench that simulates what stages save."""

import numpy as np

from bench.stage_savings import drawn, followed, rules
from lmms_plugin.analysis.findings import EQUIVALENT, OPEN, SHOWN


def test_draws_have_the_stated_difference():
    sums, sizes = drawn(np.random.default_rng(0), 20_000, 0.05)
    assert abs(sums.sum() / sizes.sum() - 0.05) < 0.005
    assert abs((np.abs(sums) / sizes).max()) <= 1.0


def test_large_differences_end_early_under_every_rule_with_stages():
    compared = rules(1500, 0.02, 4)
    sample = drawn(np.random.default_rng(1), 1500, 0.1)
    took = {name: followed(rule, stages, *sample, 4) for name, (rule, stages) in compared.items()}
    assert {finding for finding, _ in took.values()} == {SHOWN}
    assert took["one look"][1] == 1500
    assert took["planned"][1] == 375
    assert took["any-time"][1] < 1500


def test_equality_takes_fewer_images_than_all_in_planned_stages_alone():
    """Three of four samples; of one, whose difference is large by chance, the sequences tell nothing at all."""
    compared = rules(1500, 0.02, 4)
    samples = [drawn(np.random.default_rng(seed), 1500, 0.0) for seed in range(4)]
    took = {
        name: [followed(rule, stages, *sample, 4) for sample in samples] for name, (rule, stages) in compared.items()
    }
    whole = (EQUIVALENT, 1500)
    assert took == {
        "one look": [whole] * 4,
        "planned": [(EQUIVALENT, 750), (EQUIVALENT, 750), whole, (EQUIVALENT, 750)],
        "any-time": [whole, whole, (OPEN, 1500), whole],
    }
