import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.packing import FIRST_LIMITS, MOST_GROUPS, MOST_PADDING, Budget, Group, Limits, pack, waste


@st.composite
def groups(draw):
    sizes = draw(st.lists(st.integers(1, 9), max_size=30))
    made, index = [], 0
    for size in sizes:
        lengths = draw(st.lists(st.integers(1, 900), min_size=size, max_size=size))
        made.append(Group(tuple(range(index, index + size)), tuple(lengths), draw(st.sampled_from("ab"))))
        index += size
    return made


@given(groups(), st.integers(1, 12), st.integers(1, 20_000))
def test_every_request_is_in_one_batch_and_batches_keep_the_limits(made, most, tokens):
    batches = pack(made, Limits(most, tokens))
    assert sorted(group.members for batch in batches for group in batch) == sorted(group.members for group in made)
    for batch in batches:
        assert len({group.kind for group in batch}) == 1
        assert len(batch) <= most
        if len(batch) > 1:
            rows = sum(len(group.members) for group in batch)
            assert rows * max(group.longest for group in batch) <= tokens
            assert waste(batch) <= MOST_PADDING
    assert batches == sorted(batches, key=lambda batch: min(group.members for group in batch))


def test_like_lengths_go_together():
    made = [Group((i,), (length,)) for i, length in enumerate([100, 10, 99, 11, 98, 12])]
    lengths = [[group.longest for group in batch] for batch in pack(made, Limits(3, sys.maxsize))]
    assert lengths == [[100, 99, 98], [12, 11, 10]]


def test_waste_is_the_share_of_padding():
    assert waste([Group((0, 1), (10, 5)), Group((2,), (5,))]) == pytest.approx(10 / 30)


class TestBudget:
    def test_what_the_user_asks_for_stays(self):
        budget = Budget.of(4, None)
        budget.succeeded(4)
        budget.failed(4)
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
        budget.failed(budget.limits.groups)
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
            budget.failed(1)
        assert budget.limits.groups == budget.limits.tokens == 1
