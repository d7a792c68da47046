"""A few seconds of `make fuzz`: that every target runs, on the same examples each time."""

import fuzz
import pytest


@pytest.mark.parametrize("target", fuzz.TARGETS, ids=lambda target: target.__name__)
def test_a_few_examples_are_read_or_refused_in_words(target):
    fuzz.fuzz(target, number=1, examples=3)


def test_an_error_that_is_not_ours_is_found():
    with pytest.raises(KeyError):
        fuzz.fuzz(lambda _: {}["x"], number=1, examples=2)
    with pytest.raises(AssertionError, match="two"):
        fuzz.expect_told(lambda: (_ for _ in ()).throw(ValueError("in\ntwo")))
