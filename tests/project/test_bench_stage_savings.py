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
    compared = rules(1500, 0.02, 4)
    sample = drawn(np.random.default_rng(2), 1500, 0.0)
    took = {name: followed(rule, stages, *sample, 4) for name, (rule, stages) in compared.items()}
    assert took == {"one look": (EQUIVALENT, 1500), "planned": (EQUIVALENT, 750), "any-time": (OPEN, 1500)}
