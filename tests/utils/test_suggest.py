"""What a message says of a name that nobody knows."""

import pytest

from lmms_plugin.utils import suggest


@pytest.mark.parametrize(
    ("word", "expected"),
    [("aqw", ", did you mean 'awq'?"), ("AWQ", ", did you mean 'awq'?"), ("Fog", ", did you mean 'Fog'?"), ("xyz", "")],
    ids=["letters exchanged", "another case", "the same", "like none"],
)
def test_the_nearest_name_is_suggested_and_one_like_none_is_not(word, expected):
    assert suggest.near(word, ["gptq", "awq", "Fog"]) == expected


def test_an_error_lists_what_there_is_and_whose_it_is():
    assert str(suggest.unknown("option", "clap", ["clip"], "awq")) == (
        "unknown option 'clap', did you mean 'clip'? (known for 'awq': clip)"
    )
    assert str(suggest.unknown("task", "a", ())) == "unknown task 'a' (known: none)"
