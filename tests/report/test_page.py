"""The report's page in a browser: quiet, narrow, by keyboard, dark and on paper."""

from functools import partial

import pytest
from helpers import report_study

from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.report import building


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    study = report_study.write_study(tmp_path_factory.mktemp("study"), count=60)
    file = study / "report.html"
    list(building.build(study, file, MeasurementSettings(resamples=20), title="A study", figures=None, pictures=6))
    return file


@pytest.fixture
def folded(browse, written):
    """Opens the page in a window of its own."""
    return partial(browse, written)


@pytest.fixture
def opened(folded):
    """Opens the page, and unfolds table and pictures."""

    def open_(*arguments, **options):
        page = folded(*arguments, **options)
        for section in ("leader", "gallery"):
            page.locator(f"#{section} > details > summary").click()
        return page

    return open_


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def shown(page, column=None):
    """Visible rows of the leader table: their text, or that of one column."""
    rows = page.locator("#t-leader tbody tr:visible")
    cells = rows.locator(f"> :nth-child({column})") if column else rows
    return [text.split("\n")[0] for text in cells.all_inner_texts()]


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_only_tables_scroll_sideways(opened, width):
    page = opened(width)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [400, 1280, 1920])
def test_the_verdict_and_its_figures_stand_above_what_is_folded(folded, width):
    page = folded(width)
    assert page.locator("#verdict li").first.is_visible()
    drawing = page.locator("#verdict svg.figure:visible")
    assert drawing.count() == 1
    # The three figures use the width of the page.
    assert drawing.bounding_box()["width"] > 0.85 * min(width, 1536)
    for section in ("leader", "pareto", "flips", "how"):
        assert page.locator(f"#{section} h2").is_visible()
        assert not page.locator(f"#{section} > details").get_attribute("open")
    page.locator("nav a", has_text="Table").click()
    # The section is opened by the event that follows the click.
    page.locator("#t-leader").wait_for(state="visible")


def test_the_last_column_of_the_table_is_not_cut(opened):
    page = opened(1280)
    last = page.locator("#t-leader thead th").last.bounding_box()
    assert last["x"] + last["width"] <= 1280


def test_every_section_has_its_figure_and_every_picture_a_name(opened):
    page = opened()
    for section in ("pareto", "reliability", "risk", "severity", "heat", "flips", "layers"):
        assert page.locator(f"#{section} .wide svg").count(), section
    unnamed = page.evaluate("""[...document.querySelectorAll('svg[role=img]')].filter((one) => {
        const by = (one.getAttribute('aria-labelledby') || '').split(' ').filter(Boolean);
        return !one.getAttribute('aria-label') && !by.some((id) => document.getElementById(id).textContent);
    }).length""")
    assert unnamed == 0
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size") == page.evaluate(
        "document.querySelectorAll('[id]').length"
    )


def test_sorting_by_keyboard(opened):
    page = opened()
    head = page.locator("#t-leader thead th", has_text="ECE")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    up = [float(text) for text in shown(page, 4)]
    assert up == sorted(up)
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    down = [float(text) for text in shown(page, 4)]
    assert down == sorted(up, reverse=True)
    assert page.locator("#t-leader thead th[aria-sort]").count() == 1


def test_filters_by_keyboard(opened):
    page = opened()
    assert len(shown(page)) == 4
    page.get_by_label("Search").focus()
    page.keyboard.type("awq")
    assert shown(page, 1) == ["awq 3"]
    assert page.get_by_role("status").inner_text().startswith("1 of 1 rows")
    page.get_by_label("Search").fill("")
    page.locator("select[data-by=bits]").select_option("3")
    assert sorted(shown(page, 1)) == ["awq 3", "rtn 3"]
    page.get_by_label("shapes_rec: clean").focus()
    page.keyboard.press("ArrowRight")
    assert all(text.endswith("shifted") for text in page.locator("#t-leader tbody tr:visible").all_inner_texts())


def test_dark_and_light(opened):
    light, dark = background(opened()), background(opened(color_scheme="dark"))
    assert light != dark
    page = opened()
    page.get_by_role("button", name="Show in dark colours").press("Enter")
    assert background(page) == dark
    page.get_by_role("button", name="Show in light colours").press("Enter")
    assert background(page) == light


def test_paper_is_white_and_has_no_controls(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#how dl").is_visible()
    assert background(page) == background(opened())
    for control in ("nav", ".filters", "button.theme"):
        assert not page.locator(control).is_visible()
    assert page.locator("#t-leader").is_visible()
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_the_first_sheet_of_paper_holds_the_verdict_with_its_first_figures(folded):
    # A4 landscape less its margins, at 96 dots per inch.
    width, height = (round(length / 25.4 * 96) for length in (297 - 28, 210 - 28))
    page = folded(width)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    figure = page.locator("#verdict figure").first.bounding_box()
    assert figure["y"] + figure["height"] <= height


def test_everything_is_there_without_scripts(opened):
    page = opened(java_script_enabled=False)
    assert len(shown(page)) == 8
    assert not page.locator(".filters").is_visible()


def test_pictures_show_both_boxes(opened):
    page = opened()
    tile = page.locator(".tiles li").first
    assert tile.locator("rect.true").count() == 1
    assert tile.locator("rect.said").count() == 1
    assert tile.locator("b").inner_text() == "unquantized"
    box = tile.locator("svg").bounding_box()
    assert box["width"] > 80
    assert box["height"] > 40
