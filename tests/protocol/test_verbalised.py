import math

import pytest

from lmms_plugin.protocol.verbalised import stated_confidence


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("85", 0.85),
        (" 85.\n", 0.85),
        ("85%", 0.85),
        ("I am 85 percent sure.", 0.85),
        ("Confidence: 85/100", 0.85),
        ("85 out of 100", 0.85),
        ("0", 0.0),
        ("100", 1.0),
        ("1", 0.01),
        ("99.5", 0.995),
        ("Yes, 85, I think.", 0.85),
    ],
)
def test_one_number_on_the_scale_that_was_asked_for(statement, expected):
    assert stated_confidence(statement) == pytest.approx(expected)


@pytest.mark.parametrize(
    "statement",
    [
        "",
        "very sure",
        "between 80 and 90",
        "80-90",
        "[12,34,56,78]",
        "101",
        "-5",
        "0.85",
        "B52",
        "1e2",
        "85 of 86",
        ",,4,43]",
        "99,5",
        ",85",
    ],
)
def test_anything_else_is_missing_not_zero(statement):
    assert math.isnan(stated_confidence(statement))
