"""The leaderboard's page in a browser: quiet, narrow, sorted by keyboard and on a phone."""

from functools import partial

import pytest
from helpers.submissions import SETTINGS, answered, scored_as, submit, verify, write_run

from lmms_plugin.leaderboard import board
from lmms_plugin.leaderboard.verification import Refused, Verified


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page with two submissions, of which the second answered better, and one that was refused."""
    folder = tmp_path_factory.mktemp("board")
    rows = answered(24)
    better = [scored_as(row, answer=str([round(edge, 2) for edge in row["mean_iou"]["target"]])) for row in rows]
    found = [verify(submit(write_run(folder / f"run {k}", r), folder / k)) for k, r in (("one", rows), ("two", better))]
    assert all(isinstance(one, Verified) for one in found), found
    file = folder / "leaderboard.html"
    file.write_text(board.page(board.tables(found), [Refused("three", "it was changed")], SETTINGS), encoding="utf-8")
    return file


@pytest.fixture
def opened(browse, written):
    """Opens the page in a window of its own."""
    return partial(browse, written)


def names(page):
    """Submissions from top to bottom."""
    return [text.split()[0] for text in page.locator("tbody th").all_inner_texts()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_scrolls_the_page_sideways(opened, width, scheme):
    page = opened(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert names(page) == ["two", "one"]
    assert "it was changed" in page.locator("body").inner_text()


def test_sorting_by_keyboard(opened):
    page = opened()
    head = page.locator("thead th", has_text="acc@0.5")
    head.locator("button").focus()
    for direction, order in (("descending", ["two", "one"]), ("ascending", ["one", "two"])):
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == direction
        assert names(page) == order


def test_sorting_on_a_phone(opened):
    page = opened(400)
    choice = page.locator(".sort select")
    assert choice.is_visible()
    # Lower is better: the one that is always right says so with too little confidence.
    choice.select_option(label="ece")
    assert names(page) == ["one", "two"]
    choice.select_option(label="rank")
    assert names(page) == ["two", "one"]
