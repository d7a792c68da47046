"""A guarantee from planted logs: what is chosen on which images, and what is judged of it in other runs."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import planted_logs
from markupsafe import escape

from lmms_plugin.analysis.guarantees import guarantee as analysis
from lmms_plugin.analysis.guarantees.covariate import Covariate
from lmms_plugin.analysis.guarantees.covariates import ToWeigh, described
from lmms_plugin.analysis.guarantees.guarantee_results import GuaranteeSettings, Survival
from lmms_plugin.analysis.guarantees.guarantee_sentences import sentences
from lmms_plugin.analysis.guarantees.guarded_loss import GuardedLoss
from lmms_plugin.analysis.logs import read_one
from lmms_plugin.cli.main import main
from lmms_plugin.cli.screens.guarantee_screen import guarantee_screen
from lmms_plugin.report import page
from lmms_plugin.report.gallery import Gallery
from lmms_plugin.report.numbers import guarantee_numbers, results_folder
from lmms_plugin.report.numbers.summary import summarise

FOG = {"rec_fog_3": {"metadata": {"shift": "fog", "severity": 3}}}
DEV = {"rec_dev": {"dataset_path": "other"}}
COUNT = 1200


def answers(errors, seed, count=COUNT, start=0):
    """Answers that are sure by halves; of the sure ones a share is wrong, of the others a half."""
    rng = np.random.default_rng(seed)
    sure = rng.random(count) < 0.6
    wrong = rng.random(count) < np.where(sure, errors, 0.5)
    told = np.where(sure, rng.uniform(0.7, 0.95, count), rng.uniform(0.1, 0.6, count))
    found = []
    for k, (is_wrong, confidence) in enumerate(zip(wrong.tolist(), told.tolist(), strict=True)):
        both = {"coordinate_mean": confidence, "joint": confidence**4}
        found.append(planted_logs.line(start + k, 0.2 if is_wrong else 0.8, both) | {"filtered_resps": ["a box"]})
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, model, clean, fog in (("a", "quant_none", 0.004, 0.03), ("b", "quant_rtn", 0.3, 0.5)):
        tasks = {"rec": answers(clean, 1), "rec_fog_3": answers(fog, 2), "rec_dev": answers(clean, 3, start=5000)}
        planted_logs.write(folder / name, tasks, model, **FOG, **DEV)
    return folder


@pytest.fixture
def found(runs):
    def of(**settings):
        return analysis.guarantee_of(runs / "a", [runs], GuaranteeSettings(**({"calibrate": "rec_dev"} | settings)))

    return of


def cell(found, run, task):
    (one,) = [one for one in found.cells if (one.run, one.task) == (run, task)]
    return one


def records(runs, name, task):
    return read_one(runs / name).tasks[task]


def test_a_guarantee_is_chosen_on_one_run_and_judged_on_all(runs, found):
    told = found()
    assert (told.run, told.task) == ("unquantized", "rec_dev")
    assert 0.5 < told.chosen.threshold <= 0.75
    assert told.chosen.observed < told.chosen.upper <= 0.05
    assert 0.5 < told.chosen.coverage < 0.7
    assert told.chosen.images + told.chosen.pilot_images == COUNT // 4
    assert {one.task for one in told.cells} == {"rec", "rec_fog_3"}
    verdicts = {(one.run, one.task): one.verdict for one in told.cells}
    assert verdicts["unquantized", "rec"] is Survival.HOLDS
    assert verdicts["rtn 4", "rec"] is verdicts["rtn 4", "rec_fog_3"] is Survival.BROKEN
    ours, theirs = records(runs, "a", "rec"), records(runs, "b", "rec")
    accepted = theirs.confidence["coordinate_mean"] >= told.chosen.threshold
    one = cell(told, "rtn 4", "rec")
    assert (one.documents, one.images, one.accepted) == (COUNT, COUNT // 4, accepted.sum())
    assert one.risk == pytest.approx(1 - theirs.outcome[accepted].mean())
    assert one.low < one.risk < one.high
    flipped = (accepted & (ours.outcome == 1) & (theirs.outcome == 0)).mean()
    assert one.flipped == pytest.approx(flipped)
    assert flipped < one.flipped_high < flipped + 0.1
    assert cell(told, "unquantized", "rec").flipped is None
    (anew,) = told.anew
    assert (anew.run, anew.chosen.threshold) == ("rtn 4", math.inf)


def test_images_that_are_judged_are_not_chosen_on(runs):
    settings = GuaranteeSettings(risk=0.15, share=0.4)
    lone = {"rec": answers(0.004, 1), "rec_fog_3": answers(0.03, 2)}
    folder = planted_logs.write(runs.parent / "alone", lone, **FOG)
    told = analysis.guarantee_of(folder, [], settings)
    assert told.task == "rec"
    used = told.chosen.images + told.chosen.pilot_images
    assert 0.3 < used / (COUNT / 4) < 0.5
    assert [one.images for one in told.cells] == [COUNT // 4 - used] * 2


def test_a_task_that_is_chosen_on_is_judged_on_its_other_images(found):
    told = found(risk=0.15, share=0.7)
    used = told.chosen.images + told.chosen.pilot_images
    assert 0.6 < used / (COUNT / 4) < 0.8
    assert cell(told, "rtn 4", "rec_dev").images == COUNT // 4 - used
    assert cell(told, "rtn 4", "rec").images == COUNT // 4


def test_holm_is_over_what_is_judged(found):
    told = found()
    worst = min(told.cells, key=lambda one: one.p_broken)
    assert worst.verdict is Survival.BROKEN
    assert all(one.p_broken <= 0.05 for one in told.cells if one.verdict is Survival.BROKEN)
    assert all(one.p_broken > 0.05 for one in told.cells if one.verdict is Survival.OPEN)


def test_boxes_are_grown_until_they_contain_the_true_ones(runs, found):
    told = found(contain=0.9, risk=0.15)
    # Right answers have a height of 0.8 of the true one, so they grow by a quarter; wrong ones would have to by 4.
    assert told.margin.margin == pytest.approx(0.25)
    one = cell(told, "unquantized", "rec")
    ours = records(runs, "a", "rec")
    accepted = ours.confidence["coordinate_mean"] >= told.chosen.threshold
    by_image = [ours.outcome[accepted & (ours.image == k)] for k in range(COUNT // 4)]
    assert one.contained == pytest.approx(np.mean([each.mean() for each in by_image if each.size]))
    assert one.contained_verdict is Survival.HOLDS
    assert cell(told, "rtn 4", "rec_fog_3").contained_verdict is Survival.BROKEN


def test_weights_need_an_overlap(runs, found):
    told = found(reweigh=True, risk=0.15)
    same = cell(told, "unquantized", "rec").reweighed
    assert same.overlaps
    assert same.verdict is Survival.HOLDS
    assert 100 < same.effective_images <= told.chosen.images
    sure = [planted_logs.line(k, 0.8, {"coordinate_mean": 0.99, "joint": 0.99}) for k in range(COUNT)]
    folder = planted_logs.write(runs.parent / "sure", {"rec": sure}, "quant_hqq")
    settings = GuaranteeSettings(calibrate="rec_dev", reweigh=True)
    apart = cell(analysis.guarantee_of(runs / "a", [folder], settings), "hqq 4", "rec").reweighed
    assert not apart.overlaps
    assert (apart.threshold, apart.verdict) == (math.inf, Survival.NOTHING_ACCEPTED)


class Told:
    """Features that runs are said to have kept: one number per answer that tells which are hard."""

    def __init__(self, *keeping):
        self.keeping = keeping

    def kept(self, run):
        return run.model in self.keeping

    def __call__(self, name, run, records):
        hard = records.outcome == 0.0
        return np.stack([hard + 0.1 * records.numbers % 1, np.full(hard.size, np.nan)], axis=1)


def reweighed(runs, features, **settings):
    chosen = GuaranteeSettings(calibrate="rec_dev", risk=0.15, reweigh=True, **settings)
    return analysis.guarantee_of(runs / "a", [runs], chosen, features)


def test_weights_are_by_features_where_all_runs_kept_some_and_it_is_told(runs):
    by_features = reweighed(runs, Told("quant_none", "quant_rtn"))
    assert by_features.reweighing.by is Covariate.FEATURES
    said = sentences(by_features)[-1]
    assert "Reweighed by features, " in said
    assert "estimated weights are no guarantee" in said
    # The features tell which answers are hard, and the quantized run has far more of these.
    assert cell(by_features, "rtn 4", "rec").reweighed.auroc > 0.62
    assert cell(by_features, "unquantized", "rec").reweighed.auroc < 0.58
    some = reweighed(runs, Told("quant_none"))
    assert (some.reweighing.by, some.reweighing.lacking) == (Covariate.CONFIDENCES, "rtn 4")
    assert "Reweighed by confidences (rtn 4 kept no features), " in sentences(some)[-1]
    none = replace(some, cells=tuple(replace(one, reweighed=None) for one in some.cells))
    assert sentences(none)[-1].endswith(f"features), none of {len(some.cells)} tasks gets a threshold.")
    asked = reweighed(runs, Told("quant_none", "quant_rtn"), reweigh_by=Covariate.CONFIDENCES)
    assert asked.reweighing.by is Covariate.CONFIDENCES
    assert asked.cells == some.cells
    with pytest.raises(ValueError, match=r"--reweigh-by features: rtn 4 kept none .* run it again with features=DIR"):
        reweighed(runs, Told("quant_none"), reweigh_by=Covariate.FEATURES)


def test_runs_with_features_of_other_sizes_cannot_stand_for_each_other(runs):
    class Wider(Told):
        def __call__(self, name, run, records):
            width = 3 if run.model == "quant_rtn" else 2
            return np.repeat(super().__call__(name, run, records)[:, :1], width, axis=1)

    with pytest.raises(ValueError, match=r"2 numbers per answer of unquantized and 3 of rtn 4.*--reweigh-by"):
        reweighed(runs, Wider("quant_none", "quant_rtn"))


def test_images_are_described_by_means_of_what_is_known(runs):
    rec = records(runs, "a", "rec")
    keep = np.arange(COUNT) < 6
    columns = np.stack([np.arange(COUNT, dtype=float), np.where(np.arange(COUNT) % 4 == 0, 7.0, np.nan)], axis=1)
    found = described(columns, ToWeigh("a", read_one(runs / "a"), rec, keep))
    order = np.argsort(rec.images[keep], kind="stable")
    by_image = [order[rec.images[keep][order] == name].tolist() for name in np.unique(rec.images[keep])]
    means = [np.mean(columns[rows, 0]) for rows in by_image]
    shares = [np.mean(~np.isnan(columns[rows, 1])) for rows in by_image]
    assert found.tolist() == [[m, 7.0 if s else 0.0, 1.0, s] for m, s in zip(means, shares, strict=True)]


@pytest.mark.parametrize(("loss", "risk"), [(GuardedLoss.IOU, 0.3), (GuardedLoss.ERROR, 0.05)])
def test_images_that_count_alike_and_soft_losses(runs, found, loss, risk):
    told = found(loss=loss, risk=risk, per_image=True)
    ours = records(runs, "a", "rec")
    accepted = ours.confidence["coordinate_mean"] >= told.chosen.threshold
    lost = 1 - (ours.score if loss is GuardedLoss.IOU else ours.outcome)
    means = [lost[accepted & (ours.image == k)].mean() for k in np.unique(ours.image[accepted])]
    assert cell(told, "unquantized", "rec").risk == pytest.approx(np.mean(means))
    assert told.chosen.upper <= risk


def test_false_positives_are_of_expressions_that_match_nothing(tmp_path):
    folder = planted_logs.write(tmp_path, {"rejection": planted_logs.pairs(0.3, 800)})
    told = analysis.guarantee_of(folder, [], GuaranteeSettings(loss=GuardedLoss.FALSE_POSITIVE, risk=0.1))
    assert told.chosen.coverage == told.chosen.observed <= told.chosen.upper <= 0.1
    (one,) = told.cells
    assert one.documents == 800 - told.chosen.documents
    assert one.risk == one.coverage
    assert one.verdict is not Survival.BROKEN


def test_too_few_images_promise_nothing(tmp_path):
    folder = planted_logs.write(tmp_path, {"rec": answers(0.0, 1, 80)})
    told = analysis.guarantee_of(folder, [], GuaranteeSettings())
    assert told.chosen.threshold == math.inf
    assert [one.verdict for one in told.cells] == [Survival.NOTHING_ACCEPTED]
    (said,) = sentences(told)
    assert "59 without any error are the fewest" in said


@pytest.mark.parametrize(("pilot", "parts"), [(1e-9, "0 are pilot"), (1.0 - 1e-9, "0 left to test")])
def test_without_images_on_both_sides_nothing_was_tested(found, pilot, parts):
    told = " ".join(sentences(found(pilot=pilot)))
    assert "Nothing was tested" in told
    assert parts in told
    assert "were tested" not in told


@pytest.mark.parametrize(("pilot", "told"), [(1, "after 1 other said"), (2, "after 2 others said")])
def test_images_that_say_which_thresholds_to_test_are_counted(found, pilot, told):
    one = found()
    one = replace(one, chosen=replace(one.chosen, pilot_images=pilot))
    assert told in " ".join(guarantee_screen(one).split())


def test_without_a_threshold_no_margin_is_chosen(runs, found):
    told = guarantee_screen(found(risk=1e-4, contain=0.9))
    assert "No box is accepted on the images for a margin" in told
    assert "No margin of boxes is enough" not in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "rec, rec_dev; name one"),
        ({"calibrate": "elsewhere"}, "one of rec, rec_fog_3, rec_dev; got 'elsewhere'"),
        ({"loss": GuardedLoss.FALSE_POSITIVE}, "a task of rejection on clean images"),
        ({"calibrate": "rec_dev", "estimator": "agreement"}, "agreement"),
    ],
)
def test_what_cannot_be_chosen_on_is_told(runs, settings, message):
    with pytest.raises(ValueError, match=message):
        analysis.guarantee_of(runs / "a", [], GuaranteeSettings(**settings))


def test_a_run_without_confidences_cannot_be_judged(runs):
    mute = [planted_logs.line(k, 0.8, None) for k in range(COUNT)]
    folder = planted_logs.write(runs.parent / "mute", {"rec": mute}, "other")
    with pytest.raises(ValueError, match="confidences of rec in other to judge"):
        analysis.guarantee_of(runs / "a", [folder], GuaranteeSettings(calibrate="rec_dev"))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="no margin of boxes with false positives"):
        GuaranteeSettings(loss=GuardedLoss.FALSE_POSITIVE, contain=0.9)
    with pytest.raises(ValueError, match=r"--risk: expected a share between 0 and 1, .* got 1"):
        GuaranteeSettings(risk=1.0)


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["lmms-plugin", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        main()
    return capsys.readouterr().out


def test_the_command_answers_in_one_screen_and_writes_what_the_report_shows(runs, tmp_path, monkeypatch, capsys):
    asked = ("guarantee", runs / "a", "--on", runs / "b", "--calibrate", "rec_dev")
    printed(monkeypatch, capsys, *asked, "--output", tmp_path / "a" / "new" / "guarantee.json")
    assert (tmp_path / "a" / "new" / "guarantee.json").is_file()
    shown = printed(monkeypatch, capsys, *asked, "--output", tmp_path / "guarantee.json")
    lines = shown.rstrip("\n").split("\n")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    said = " ".join(lines[: lines.index("")])
    assert said.startswith("At most 5 % of accepted answers are wrong, with 95 % confidence, at a confidence of 0.")
    assert "Of 4 tasks of 2 runs, it is broken on 2," in said
    assert "On clean images it is broken for rtn 4. Under shift it is broken for rtn 4." in said
    told = json.loads((tmp_path / "guarantee.json").read_text())
    assert json.loads(printed(monkeypatch, capsys, *asked, "--json")) == told
    reported = guarantee_numbers.read(tmp_path)
    assert " ".join(reported.sentences) == said
    assert [row[2].text for row in reported.table.rows] == [one["verdict"] for one in told["cells"]]
    summary = summarise(results_folder.read_folder(runs, planted_logs.SETTINGS), planted_logs.SETTINGS.level)
    without, with_it = (page.render(summary, "", None, Gallery((), ()), "here", 1, one) for one in (None, reported))
    assert 'href="#guarantee"' in with_it
    assert '<section id="guarantee"' in with_it
    assert all(escape(sentence) in with_it for sentence in reported.sentences)
    assert with_it.count(">broken<") == 2
    assert "#guarantee" not in without
    everything = printed(monkeypatch, capsys, *asked, "--all", "--contain", "0.9", "--reweigh")
    assert everything.count("rec_fog_3") == 2
    assert {"contained", "effective", "AUROC"} <= set(everything.split())
    assert guarantee_numbers.read(runs) is None
    (tmp_path / "guarantee.json").write_text(json.dumps(told | {"cells": [{"run": "a"}]}))
    with pytest.raises(ValueError, match="damaged"):
        guarantee_numbers.read(tmp_path)
