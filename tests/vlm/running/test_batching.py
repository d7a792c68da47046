import sys

import numpy as np
import pytest

from lmms_plugin.vlm.running.batching import (
    FIRST_LIMITS,
    LEAST_CACHE_BYTES,
    MOST_GROUPS,
    MOST_PADDING,
    Budget,
    Limits,
    RequestGroup,
    in_order,
    pack,
    waste,
)


def random_groups(rng):
    made, index = [], 0
    for size in rng.integers(1, 10, rng.integers(0, 31)):
        lengths = tuple(map(int, rng.integers(1, 901, size)))
        made.append(RequestGroup(tuple(range(index, index + int(size))), lengths, "ab"[rng.integers(2)]))
        index += int(size)
    return made


def test_every_request_is_in_one_batch_and_batches_keep_the_limits():
    rng = np.random.default_rng(0)
    for _ in range(100):
        made, limits = random_groups(rng), Limits(int(rng.integers(1, 13)), int(rng.integers(1, 20_001)))
        batches = pack(made, limits)
        assert sorted(group for batch in batches for group in batch) == sorted(made)
        assert batches == sorted(batches, key=lambda batch: min(group.members for group in batch))
        for batch in batches:
            assert len({group.kind for group in batch}) == 1
            assert len(batch) <= limits.groups
            if len(batch) > 1:
                assert len(batch) * max(group.longest for group in batch) <= limits.tokens
                assert waste(batch) <= MOST_PADDING


def test_like_lengths_go_together():
    made = [RequestGroup((i,), (length,)) for i, length in enumerate([100, 10, 99, 11, 98, 12])]
    lengths = [[group.longest for group in batch] for batch in pack(made, Limits(3, sys.maxsize))]
    assert lengths == [[100, 99, 98], [12, 11, 10]]


def test_waste_is_the_share_of_padding():
    assert waste([RequestGroup((0, 1), (10, 5)), RequestGroup((2,), (5,))]) == pytest.approx(10 / 30)


@pytest.mark.parametrize(
    ("lengths", "limits", "parts"),
    [
        ([], Limits(2, 100), []),
        ([5] * 5, Limits(2, 100), [[0, 1], [2, 3], [4]]),
        ([40, 40, 60, 20], Limits(9, 100), [[0, 1], [2], [3]]),
        ([200, 1, 1, 200], Limits(9, 100), [[0], [1, 2], [3]]),
    ],
    ids=["nothing", "count", "tokens", "too long"],
)
def test_requests_that_go_alone_keep_order_and_limits(lengths, limits, parts):
    assert [list(part) for part in in_order(lengths, limits)] == parts


class TestBudget:
    def test_what_the_user_asks_for_stays(self):
        budget = Budget.of(4, None)
        budget.succeeded(4)
        budget.failed(4, shared=False)
        assert budget.limits.groups == 4

    def test_on_a_cpu_an_automatic_batch_is_fixed(self):
        budget = Budget.of(None, None)
        for _ in range(10):
            budget.succeeded(budget.limits.groups)
        assert budget.limits == FIRST_LIMITS

    def test_on_an_accelerator_it_doubles_until_it_fails_and_then_stays_below(self):
        budget = Budget.of(None, 80 * 2**30)
        for _ in range(2):
            budget.succeeded(budget.limits.groups)
        assert budget.limits.groups == 4 * FIRST_LIMITS.groups
        budget.failed(budget.limits.groups, shared=False)
        assert budget.limits.groups == 2 * FIRST_LIMITS.groups
        budget.succeeded(budget.limits.groups)
        assert budget.limits.groups == 2 * FIRST_LIMITS.groups

    def test_a_small_batch_says_nothing_about_larger_ones(self):
        budget = Budget.of(None, 80 * 2**30)
        budget.succeeded(1)
        assert budget.limits == FIRST_LIMITS

    def test_growth_ends(self):
        budget = Budget.of(None, 80 * 2**30)
        for _ in range(100):
            budget.succeeded(budget.limits.groups)
        assert budget.limits.groups == MOST_GROUPS

    def test_failing_leaves_room_for_a_single_request(self):
        budget = Budget.of(None, 2**30)
        for _ in range(50):
            budget.failed(1, shared=True)
        assert budget.limits.groups == budget.limits.tokens == 1
        assert budget.cache_bytes == LEAST_CACHE_BYTES

    def test_keys_and_values_get_less_room_only_where_they_were_part_of_it(self):
        budget = Budget.of(None, 2**32)
        budget.failed(8, shared=False)
        assert budget.cache_bytes == 2**30
        budget.failed(8, shared=True)
        assert budget.cache_bytes == 2**29

    def test_room_for_keys_and_values_that_is_small_from_the_start_stays(self):
        budget = Budget.of(None, 4 * 1000)
        budget.failed(8, shared=True)
        assert budget.cache_bytes == 1000
