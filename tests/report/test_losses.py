"""What the report says on top: how many configurations lose accuracy, calibration and coverage, and which most."""

import pytest
from helpers import report_study
from matplotlib import rc_context

from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.report.figures import losses
from lmms_plugin.report.figures.drawing import STYLE
from lmms_plugin.report.numbers import lost_numbers, results_folder
from lmms_plugin.report.numbers.lost_numbers import LOSSES
from lmms_plugin.report.numbers.summary import summarise

SETTINGS = MeasurementSettings(resamples=50)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    study = report_study.write_study(tmp_path_factory.mktemp("study"), 60)
    return summarise(results_folder.read_folder(study, SETTINGS), SETTINGS.level)


def test_losses_are_differences_from_the_unquantized_model(summary):
    (scope,) = summary.scopes
    found = lost_numbers.lost(scope)
    assert next(config.label for config in found) == "rtn 2"
    assert sorted(config.label for config in found) == ["awq 3", "rtn 2", "rtn 3"]
    for config, of in found.items():
        assert set(of) == {"clean", "shifted"}
        for condition, one in of.items():
            (line,) = [line for line in scope.under(condition) if line.config == config]
            for loss in LOSSES:
                difference = line.group.of(loss.metric) - line.base.group.of(loss.metric)
                assert one.of(loss).value == pytest.approx(difference)
                assert one.of(loss).interval.low <= one.of(loss).interval.high
            assert one.of(LOSSES[0]) == line.delta


def test_the_sentences_count_what_was_shown(summary):
    (scope,) = summary.scopes
    found = lost_numbers.lost(scope)
    said = list(lost_numbers.sentences(summary))
    assert len(said) == len(LOSSES)
    for sentence, loss in zip(said, LOSSES, strict=True):
        assert sentence.startswith(f"shapes_rec: {loss.said} ")
        for condition in ("clean", "shifted"):
            ends = [of[condition].of(loss).interval for of in found.values()]
            shown = sum(end.low > 0 if loss.high_is_bad else end.high < 0 for end in ends)
            assert f"{shown} of 3 quantized configurations on {condition} data" in sentence
    assert "most: rtn 2, \u2212" in said[0]


def test_the_figure_has_a_panel_for_each_loss_on_both_kinds_of_page(summary):
    (scope,) = summary.scopes
    for across in (4, 2):
        with rc_context(dict(STYLE)):
            (drawn,) = losses.draw(scope, summary, across)
        panels = drawn.figure.axes
        assert [panel.get_title(loc="left") for panel in panels] == [loss.title for loss in LOSSES]
        assert next(text.get_text() for text in panels[0].get_yticklabels()) == "rtn 2"
        assert len(drawn.table.rows) == 6
        # Whatever is lost lies left of the line, calibration too.
        marks = [line for line in panels[1].lines if line.get_marker() not in ("", "None")]
        of = lost_numbers.lost(scope)
        expected = sorted(-100 * one.of(LOSSES[1]).value for each in of.values() for one in each.values())
        assert sorted(float(mark.get_xdata()[0]) for mark in marks) == pytest.approx(expected)


def test_without_an_unquantized_run_nothing_is_lost(tmp_path):
    report_study.write_cell(tmp_path, "rtn-3", report_study.documents(20), report_study.axes("rtn", 3), 0.8)
    alone = summarise(results_folder.read_folder(tmp_path, SETTINGS), SETTINGS.level)
    assert list(lost_numbers.sentences(alone)) == []
    assert list(losses.draw(alone.scopes[0], alone, 4)) == []
