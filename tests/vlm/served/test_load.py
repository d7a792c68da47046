"""Requests in flight: which of them wait for which."""

import threading

import pytest

from lmms_plugin.vlm.served.load import Flight, Gate

UNITS = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"], "none": [], "c": ["c0"]}
LONG = 30


def flight(ask, first_alone, most=16):
    return Flight(UNITS.__getitem__, ask, Gate(most), 1, lambda: None, first_alone)


@pytest.mark.parametrize("first_alone", [True, False])
@pytest.mark.parametrize("most", [1, 2, 16])
def test_every_item_is_asked_for_once_and_no_more_at_a_time_than_the_gate_allows(first_alone, most):
    lock, now, highest = threading.Lock(), [0], [0]

    def ask(item):
        with lock:
            now[0] += 1
            highest[0] = max(highest[0], now[0])
        with lock:
            now[0] -= 1
        return item.upper()

    found = list(flight(ask, first_alone, most).results(UNITS))
    assert sorted(found) == sorted((item, item.upper()) for items in UNITS.values() for item in items)
    assert highest[0] <= most


def test_the_others_of_a_unit_wait_for_its_first():
    done, waited = set(), []
    both = threading.Barrier(2, timeout=LONG)

    def ask(item):
        if item in ("a0", "b0"):
            # The first ones of several units go at the same time.
            both.wait()
        waited.append(item.endswith("0") or f"{item[0]}0" in done)
        done.add(item)

    assert len(list(flight(ask, first_alone=True).results(UNITS))) == len(waited) == 6
    assert all(waited)


def test_a_unit_goes_at_once_where_nothing_waits():
    """Each waits until all the others have been asked for."""
    every = threading.Barrier(sum(map(len, UNITS.values())), timeout=LONG)
    assert len(list(flight(lambda item: every.wait(), first_alone=False).results(UNITS))) == 6
