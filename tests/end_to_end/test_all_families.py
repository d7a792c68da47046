"""Every family of transformers' mapping, tiny, against the page that says what works: docs/families.md."""

import pytest
from helpers.small_families import FAMILIES, PAGE, examine, line

WRITTEN = {row.split(" | ")[0].removeprefix("| "): row for row in PAGE.read_text(encoding="utf-8").splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_what_the_page_says(family, tmp_path):
    assert line(family, examine(family, tmp_path)) == WRITTEN[family]


def test_the_page_holds_every_family():
    assert set(FAMILIES) <= set(WRITTEN)
