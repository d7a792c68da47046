"""Results folders: reading, matching, and the metrics and comparisons made of them."""

import dataclasses
import io
import json
import math
import re
import warnings

import numpy as np
import pytest
from helpers.planted_logs import CELLS, SETTINGS, answers, line, write, write_grid
from rich.console import Console

from lmms_plugin import metrics
from lmms_plugin.analysis import comparison, logs, measure, overview
from lmms_plugin.cli import printed
from lmms_plugin.cli.main import main
from lmms_plugin.metrics import bootstrap, robustness
from lmms_plugin.metrics.posthoc import CALIBRATORS
from lmms_plugin.report.numbers import results_folder as report


def test_records_come_as_arrays_in_the_order_of_their_ids(tmp_path):
    lines = [line(2, 0.7, {"joint": 0.5}), line(1, 0.0, {"joint": None}), line(0, 0.5, {"joint": 1.0})]
    run = logs.read_one(write(tmp_path, {"rec": lines}, rec={"metadata": {"shift": "fog", "severity": 3}}))
    records = run.tasks["rec"]
    assert records.ids.tolist() == ["000", "001", "002"]
    assert records.score.tolist() == [0.5, 0.0, 0.7]
    assert records.outcome.tolist() == [1.0, 0.0, 1.0]
    assert records.parsed.tolist() == [True, False, True]
    np.testing.assert_array_equal(records.confidence["joint"], [1.0, np.nan, 0.5])
    assert records.place == ("data", "test", "fog", 3, "image")
    with pytest.raises(ValueError, match="one of the estimators joint, got 'coordinate_mean'"):
        records.confidence_by(None)
    with pytest.raises(ValueError, match=r"got 'agreement' \(run with --model_args samples=8\)"):
        records.confidence_by("agreement")


def test_answers_may_hold_any_separator(tmp_path):
    folder = write(tmp_path, {"rec": answers(0.8)})
    log = next(folder.glob("*.jsonl"))
    log.write_text(log.read_text().replace("thing 7", "thing\u2028of\x85seven"), encoding="utf-8")
    assert logs.read_one(folder).tasks["rec"].asked[7].startswith('["thing')


def test_soft_scores_and_parts_of_question_answering(tmp_path):
    def row(k, part):
        record = {"image": f"i{k}", "id": str(k), "part": part, "accuracy": 0.3, "question": "?", "answers": ["a"]}
        # An estimator without a value is left out of these records.
        return {"accuracy": record | {"confidence": {"joint": 0.4} | ({"mean": 0.5} if k else {})}}

    lines = [row(0, "val"), row(1, "test"), row(2, "test"), row(3, "dev")]
    records = logs.read_one(write(tmp_path, {"vqa": lines})).tasks["vqa"]
    assert records.outcome.tolist() == [0.3] * 4
    np.testing.assert_array_equal(records.confidence["mean"], [np.nan, 0.5, 0.5, 0.5])
    assert records.reported.tolist() == [False, True, True, False]
    assert measure.held_out(records, SETTINGS).tolist() == [True, False, False, False]


def test_model_without_probabilities_has_no_calibration(tmp_path):
    run = logs.read_one(write(tmp_path, {"rec": [line(k, 0.6, None) for k in range(8)]}))
    numbers = {number.metric: number.value for number in measure.measure(run, SETTINGS)}
    assert numbers["acc@0.5"] == 1.0
    assert numbers["confidence_rate"] == 0.0
    assert not {"ece", "aurc", "phi@10", "ece_floor"} & set(numbers)


def test_tasks_of_others_are_left_out(tmp_path):
    folder = write(tmp_path, {"rec": answers(0.8), "mmmu": [{"doc_id": 0, "mmmu_acc": 1.0}]}, mmmu={"metric_list": []})
    run = logs.read_one(folder)
    assert list(run.tasks) == ["rec"]
    assert run.others == ("mmmu",)


def damage_line(folder):
    log = next(folder.glob("*_samples_rec.jsonl"))
    log.write_text(log.read_text()[:-40])


def drop_line(folder):
    log = next(folder.glob("*_samples_rec.jsonl"))
    log.write_text("\n".join(log.read_text().splitlines()[:-1]))


def empty_log(folder):
    next(folder.glob("*_samples_rec.jsonl")).write_text("")


def repeat_line(folder):
    log = next(folder.glob("*_samples_rec.jsonl"))
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:-1], lines[0]]))


def binary(folder):
    log = next(folder.glob("*_samples_rec.jsonl"))
    log.write_bytes(log.read_bytes() + b"\xff\xfe\n")


def replace(before, after):
    def damage(folder):
        log = next(folder.glob("*_samples_rec.jsonl"))
        text = log.read_text()
        assert before in text
        log.write_text(text.replace(before, after, 1))

    return damage


def edit_table(folder):
    file = next(folder.glob("*_results.json"))
    content = json.loads(file.read_text())
    content["results"]["rec"]["mean_iou,none"] += 0.01
    file.write_text(json.dumps(content))


def drop_confidence(folder):
    log = next(folder.glob("*_samples_rec.jsonl"))
    log.write_text(log.read_text().replace('"confidence": {', '"was": {', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("*.jsonl")).unlink(), "run lmms-eval with --log_samples"),
        (damage_line, r"jsonl:120, which is damaged"),
        (drop_line, "expected 120 documents .* got 119"),
        (empty_log, "got an empty file"),
        (repeat_line, "got 000 twice"),
        (binary, r"jsonl:121, which is damaged"),
        (
            replace('"score": 0.8', '"score": 0.7'),
            "expected the log of the same run .* where the table of results says",
        ),
        (edit_table, "expected the log of the same run .* where the table of results says"),
        (replace('"score": 0.8', '"score": 1.7'), r"expected score in \[0, 1\] for 000 in .*, got 1.7"),
        (replace('"score": 0.8', '"score": NaN'), r"expected score in \[0, 1\] for 000 in .*, got nan"),
        (replace('"score": 0.8', '"score": "good"'), r"expected score in \[0, 1\] for 000 in .*, got 'good'"),
        (replace('"joint": 0.', '"joint": 1.'), r"expected confidence joint in \[0, 1\] for 000 in"),
        (replace('"joint": 0.', '"joint": "high", "was": 0.'), r"expected confidence joint in \[0, 1\] .* got 'high'"),
        (drop_confidence, "expected a confidence by coordinate_mean, joint for 000 .* got none"),
        (lambda folder: next(folder.glob("*.json")).write_text("{}"), "expected a results file"),
        (lambda folder: next(folder.glob("*.json")).unlink(), "expected a results file or a folder"),
    ],
    ids=[
        "no log",
        "cut off",
        "incomplete",
        "empty log",
        "twice",
        "binary",
        "edited log",
        "edited table",
        "score above 1",
        "score NaN",
        "score text",
        "confidence above 1",
        "confidence text",
        "lost confidence",
        "not results",
        "empty folder",
    ],
)
@pytest.mark.parametrize("command", ["metrics", "compare"])
def test_damaged_results_are_refused_in_one_line(tmp_path, monkeypatch, capsys, command, damage, message):
    folder = write(tmp_path / "run", {"rec": answers(0.8)})
    damage(folder)
    paths = [str(folder)] * (2 if command == "compare" else 1)
    monkeypatch.setattr("sys.argv", ["lmms-plugin", command, *paths])
    with pytest.raises(SystemExit) as status:
        main()
    printed = capsys.readouterr()
    assert status.value.code == 2
    (error,) = printed.err.splitlines()
    assert error.startswith("lmms-plugin: ")
    assert printed.out == ""
    with pytest.raises(ValueError, match=message):
        logs.read_one(folder)


def changed(position, key, value):
    lines = answers(0.8)
    lines[position]["mean_iou"][key] = value
    return {"rec": lines}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"rec": answers(0.8)[:-3]}, "the second lacks 3 of 120, e.g. 117"),
        (changed(5, "target", [0, 0, 0.5, 1]), "same asked .* 1 documents differ, e.g. 005"),
        (changed(5, "image", "other"), "same images .* 1 documents differ, e.g. 005"),
        ({"rec_testB": answers(0.8)}, "the first alone has rec, the second rec_testB"),
    ],
    ids=["fewer", "another truth", "another image", "another task"],
)
def test_runs_on_other_documents_are_not_compared(tmp_path, second, message):
    runs = [logs.read_one(write(tmp_path / n, tasks)) for n, tasks in (("a", {"rec": answers(0.8)}), ("b", second))]
    with pytest.raises(ValueError, match=message):
        comparison.compare(*runs, SETTINGS)


def test_several_runs_in_a_folder_have_to_be_named(tmp_path):
    for date in ("20260101_000000", "20260101_000100"):
        write(tmp_path, {"rec": answers(0.8)}, date=date)
    with pytest.raises(ValueError, match=r"got 2: 20260101_000000_results\.json, .*; name the results file"):
        logs.read_one(tmp_path)
    assert logs.read_one(tmp_path / "20260101_000100_results.json").tasks["rec"].ids.size == 120


def test_metrics_are_those_of_the_records(tmp_path):
    run = logs.read_one(write(tmp_path, {"rec": answers(0.8)}))
    records = run.tasks["rec"]
    c, y = records.confidence["coordinate_mean"], records.outcome
    numbers = {number.metric: number for number in measure.measure(run, SETTINGS)}
    for name, metric in {"ece": metrics.ece, "aurc": metrics.aurc, "smooth_ece": metrics.smooth_ece}.items():
        assert numbers[name].value == pytest.approx(metric(c, y))
        assert numbers[name].records == 120
        assert numbers[name].images == 30
    assert numbers["acc@0.5"].low < y.mean() < numbers["acc@0.5"].high
    # Thresholds come from some images, results from all others.
    aside = measure.held_out(records, SETTINGS)
    assert not set(records.images[aside]) & set(records.images[~aside])
    assert numbers["phi@10"].records == np.sum(~aside)
    threshold = metrics.threshold_at_cost(c[aside], y[aside], 10)
    expected = metrics.effective_reliability(c[~aside], y[~aside], 10, threshold)
    assert numbers["phi@10"].value == pytest.approx(expected)


def test_thresholds_of_shifted_tasks_come_from_clean_images(tmp_path):
    run = write_grid(tmp_path, 0.9)
    numbers = {(number.task, number.metric): number.value for number in measure.measure(run, SETTINGS)}
    clean, shifted = run.tasks["rec"], run.tasks["rec_fog_3"]
    aside = measure.held_out(clean, SETTINGS)
    c = clean.confidence["coordinate_mean"]
    threshold = metrics.threshold_at_risk(c[aside], clean.outcome[aside], 0.2)
    achieved = metrics.at_threshold(c[~aside], shifted.outcome[~aside], threshold)
    assert numbers["rec_fog_3", "achieved_risk@0.2"] == pytest.approx(achieved.risk)
    assert numbers["rec_fog_3", "achieved_risk@0.2"] > numbers["rec", "achieved_risk@0.2"]


def test_thresholds_never_come_from_another_task_on_the_same_split(tmp_path):
    tasks = {"rec": answers(0.9), "rec_easy": answers(0.99)}
    alone = logs.read_one(write(tmp_path / "alone", {"rec_easy": answers(0.99)}))
    both = measure.measure(logs.read_one(write(tmp_path / "both", tasks)), SETTINGS)
    # As text, in which undefined numbers are equal.
    assert [str(x) for x in both if x.task == "rec_easy"] == [str(x) for x in measure.measure(alone, SETTINGS)]


def test_robustness_per_severity(tmp_path):
    rows = {row.metric: row for row in measure.robust(write_grid(tmp_path, 0.9), SETTINGS)["rec"]}
    accuracy = rows["acc@0.5"]
    assert accuracy.retained == pytest.approx(accuracy.mean / accuracy.clean)
    assert set(accuracy.per_severity) == {1, 3}
    assert 0 < accuracy.per_severity[1] < accuracy.per_severity[3]
    # Confidence says nothing about these answers, so the area under the risk grows with the errors.
    assert 0 < rows["aurc"].per_severity[1] < rows["aurc"].per_severity[3]


def test_what_keeps_robustness_from_being_told_is_said(tmp_path):
    whole = write_grid(tmp_path / "whole", 0.9)
    assert measure.without_grid(whole) == []
    for lost, why in (
        ("rec", "expected one clean task on the same split, got none"),
        ("rec_fog_3", r"a mean over shifts and severities lacks fog 3 \(of 1\)"),
    ):
        tasks = {name: records for name, records in whole.tasks.items() if name != lost}
        run = dataclasses.replace(whole, tasks=tasks)
        (line,) = measure.without_grid(run)
        assert re.search(f"no robustness to shifts of image from rec_fog_1 .*: {why}", line)
        assert measure.robust(run, SETTINGS) == {}


def test_comparison_with_itself_finds_nothing(tmp_path):
    run = logs.read_one(write(tmp_path, {"rec": answers(0.8)}))
    found = comparison.compare(run, run, SETTINGS, margin=0.01)
    assert found.flips == [("rec", 0, 0, 1.0, 120)]
    for change in found.changes:
        assert change.difference == (0.0, 0.0, 0.0, 1.0, True)
        assert change.p_holm == change.p_bh == 1.0


def test_comparison_counts_flips_and_sees_the_loss(tmp_path):
    first, second = write_grid(tmp_path / "a", 0.95), write_grid(tmp_path / "b", 0.75)
    found = comparison.compare(first, second, measure.MeasurementSettings(resamples=400), margin=0.05)
    (flipped,) = [row for row in found.flips if row.task == "rec"]
    lost = np.sum(first.tasks["rec"].outcome > second.tasks["rec"].outcome)
    assert (flipped.lost, flipped.won) == (lost, 0)
    assert flipped.p == pytest.approx(2 * 0.5**lost)
    (accuracy,) = [row for row in found.changes if (row.task, row.metric) == ("rec", "acc@0.5")]
    assert accuracy.difference.value == pytest.approx(-lost / 120)
    assert accuracy.difference.high < 0
    assert accuracy.difference.p <= accuracy.p_bh <= accuracy.p_holm <= 5 * accuracy.difference.p
    assert accuracy.difference.equivalent is False


def test_interaction_tells_additive_from_amplified_loss(tmp_path):
    first = write_grid(tmp_path / "a", 0.95)
    settings = measure.MeasurementSettings(resamples=300)
    interactions = {}
    for name, per_severity in (("additive", 1.0), ("amplified", 2.0)):
        found = comparison.compare(first, write_grid(tmp_path / name, 0.85, per_severity), settings)
        (interactions[name],) = [row.interaction for row in found.shifted if row.metric == "acc@0.5"]
        (errors,) = found.corruption_errors
        assert errors.error_ratio > 1
    assert interactions["amplified"].high < 0
    assert interactions["additive"].low < 0 < interactions["additive"].high


def test_mean_corruption_error_with_its_interval(tmp_path):
    first, second = write_grid(tmp_path / "a", 0.9), write_grid(tmp_path / "b", 0.75)
    (errors,) = comparison.compare(first, second, measure.MeasurementSettings(resamples=300)).corruption_errors

    def by_hand(times):
        # Records are repeated as often as their image was drawn.
        def wrong(run, task):
            records = run.tasks[task]
            _, index = np.unique(records.images, return_inverse=True)
            return 1.0 - np.average(records.outcome, weights=times[index])

        shifts = {task: place for task, place in CELLS.items() if place}
        ratios, relative = [], []
        for shift in {place[0] for place in shifts.values()}:
            tasks = [task for task, place in shifts.items() if place[0] == shift]
            sums = [sum(wrong(run, task) for task in tasks) for run in (second, first)]
            more = [total - len(tasks) * wrong(run, "rec") for total, run in zip(sums, (second, first), strict=True)]
            ratios.append(sums[0] / sums[1])
            relative.append(more[0] / more[1])
        return np.mean(ratios), np.mean(relative)

    images = np.unique(first.tasks["rec"].images).size
    assert (errors.error_ratio, errors.added_error_ratio) == pytest.approx(by_hand(np.ones(images)))
    drawn = np.array([by_hand(bootstrap.draw(images, 0, k)) for k in range(300)])
    assert errors.error_ratio_interval == pytest.approx(np.quantile(drawn[:, 0], [0.025, 0.975]))
    assert errors.added_error_ratio_interval == pytest.approx(np.quantile(drawn[:, 1], [0.025, 0.975]))
    assert (errors.shifts, errors.severities) == (len({p[0] for p in CELLS.values() if p}), (1, 3))
    assert 1 < errors.error_ratio_interval.low < errors.error_ratio < errors.error_ratio_interval.high


def test_without_errors_to_compare_with_there_is_no_interval(tmp_path):
    perfect = write_grid(tmp_path / "a", 1.0, 0.0)
    (errors,) = comparison.compare(perfect, perfect, SETTINGS).corruption_errors
    assert np.isnan([errors.error_ratio, *errors.error_ratio_interval, *errors.added_error_ratio_interval]).all()


def test_ratios_without_a_mean_are_undefined_and_warn_of_nothing():
    # One shift costs the reference nothing and the other model something; another one the other way round.
    error, reference = np.array([[0.2], [0.05]]), np.array([[0.1], [0.1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(robustness.relative_mean_corruption_error(error, 0.1, reference, 0.1))
        assert robustness.relative_mean_corruption_error([[0.2], [0.2]], 0.1, reference, 0.1) == math.inf


def test_a_group_changes_by_the_mean_change_of_its_tasks(tmp_path):
    first, second = (write_grid(tmp_path / name, skill) for name, skill in (("a", 0.95), ("b", 0.75)))
    found = comparison.compare(first, second, SETTINGS)
    assert {(one.group, one.condition, one.tasks) for one in found.groups} == {
        ("rec", "clean", 1),
        ("rec", "shifted", 4),
    }
    for one in found.groups:
        clean = one.condition == "clean"
        rows = [row for row in found.changes if row.metric == one.metric and (row.task == "rec") == clean]
        assert one.difference.value == pytest.approx(np.mean([row.difference.value for row in rows]))
        assert one.records == sum(row.records for row in rows)
        assert one.p_holm >= one.difference.p


def test_an_overview_has_the_numbers_of_the_tables(tmp_path):
    run = write_grid(tmp_path, 0.9)
    seen = overview.overview(run, SETTINGS)
    numbers = {(number.task, number.metric): number for number in measure.measure(run, SETTINGS)}
    for row in seen.tasks:
        for name, one in (("acc@0.5", row.accuracy), ("ece", row.ece), ("coverage@0.05", row.coverage)):
            other = numbers[row.name, name]
            assert one == pytest.approx((other.value, other.low, other.high))
        assert row.ece_floor == numbers[row.name, "ece_floor"].value
    clean, shifted = seen.groups
    assert clean.accuracy == seen.tasks[0].accuracy
    assert (shifted.condition, shifted.tasks) == ("shifted", 4)
    assert shifted.aurc.value == pytest.approx(np.mean([row.aurc.value for row in seen.tasks[1:]]))
    assert shifted.ece_floor == pytest.approx(np.mean([row.ece_floor for row in seen.tasks[1:]]))


@pytest.mark.parametrize("command", ["metrics", "compare"])
def test_json_holds_what_the_tables_show(tmp_path, monkeypatch, capsys, command):
    write_grid(tmp_path / "a", 0.95)
    write_grid(tmp_path / "b", 0.75)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")][: 2 if command == "compare" else 1]
    monkeypatch.setattr("sys.argv", ["lmms-plugin", command, *paths, "--resamples", "30", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = found["changes"] if command == "compare" else found[0]["metrics"]
    assert {row["task"] for row in rows} == set(CELLS)
    monkeypatch.setattr("sys.argv", ["lmms-plugin", command, *paths, "--resamples", "30", "--all"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    value = next(row for row in rows if row["metric"] == "aurc")
    assert f"{value['second' if command == 'compare' else 'value']:.4f}" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibrator": "histogram"}, "expected a calibrator of temperature, platt, isotonic, beta, got 'histogram'"),
        ({"held_out": 0.0}, "held-out"),
        ({"level": 95}, "confidence level"),
        ({"level": math.nan}, "confidence level"),
    ],
    ids=["calibrator", "nothing held out", "percent", "nan"],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        measure.MeasurementSettings(**settings)


def test_one_image_has_no_interval(tmp_path):
    run = logs.read_one(write(tmp_path, {"rec": answers(0.8)[:4]}))
    with pytest.raises(ValueError, match="at least 2 images in task rec"):
        measure.measure(run, SETTINGS)
    with pytest.raises(ValueError, match="at least 2 images in task rec"):
        comparison.compare(run, run, SETTINGS)


def test_two_images_leave_none_to_hold_out(tmp_path):
    lines = answers(0.8)[:8]
    for seed in range(8):
        run = logs.read_one(write(tmp_path, {"rec": lines}))
        settings = measure.MeasurementSettings(resamples=20, seed=seed, held_out=0.5)
        numbers = {number.metric for number in measure.measure(run, settings)}
        # One of them or both are held out or none is: never are there two left to make an interval of.
        assert "aurc" in numbers
        assert "phi@10" not in numbers


@pytest.mark.parametrize(("skill", "right"), [(2, True), (-1, False)], ids=["all right", "all wrong"])
def test_thresholds_need_no_mixture_of_outcomes_and_calibrators_do(tmp_path, skill, right):
    run = logs.read_one(write(tmp_path, {"rec": answers(skill)}))
    numbers = {number.metric: number.value for number in measure.measure(run, SETTINGS)}
    assert not [name for name in numbers if "after" in name]
    # All right: the lowest held-out confidence is the threshold. All wrong: nothing may be answered.
    assert (numbers["achieved_coverage@0.01"] > 0.9) if right else (numbers["achieved_coverage@0.01"] == 0.0)
    assert math.isnan(numbers["auroc"])
    shown = io.StringIO()
    Console(file=shown, width=140).print(printed.metrics_table(measure.measure(run, SETTINGS), "", 0.95))
    assert "undefined" in shown.getvalue()
    assert "nan" not in shown.getvalue()
    assert "-0.0000" not in shown.getvalue()


def test_calibration_errors_and_their_intervals_stay_fractions(tmp_path):
    for number in measure.measure(logs.read_one(write(tmp_path, {"rec": answers(0.8)})), SETTINGS):
        if number.metric in ("ece", "mce", "ace", "smooth_ece", "laece_0") and not math.isnan(number.low):
            assert 0.0 <= number.low <= number.high <= 1.0


@pytest.mark.parametrize("calibrator", ["temperature", "platt", "isotonic", "beta"])
def test_every_calibrator_can_be_asked_for(tmp_path, calibrator):
    run = logs.read_one(write(tmp_path, {"rec": answers(0.8)}))
    records, settings = run.tasks["rec"], measure.MeasurementSettings(resamples=20, calibrator=calibrator)
    aside = measure.held_out(records, settings)
    c, y, images = records.confidence["coordinate_mean"], records.outcome, records.images
    fitted = CALIBRATORS[calibrator].fit(c[aside], y[aside], images[aside].tolist(), split="held out")
    after = metrics.brier(fitted.apply(c[~aside], images[~aside].tolist()), y[~aside])
    numbers = {number.metric: number.value for number in measure.measure(run, settings)}
    assert numbers[f"brier_after_{calibrator}"] == pytest.approx(after)


def test_thresholds_and_calibrators_of_another_run(tmp_path):
    first, second = write_grid(tmp_path / "a", 0.95), write_grid(tmp_path / "b", 0.75)
    numbers = {(n.task, n.metric): n.value for n in measure.measure(second, SETTINGS, chosen_on=first)}
    chosen, judged = first.tasks["rec"], second.tasks["rec_fog_1"]
    aside, c = measure.held_out(chosen, SETTINGS), chosen.confidence["coordinate_mean"]
    threshold = metrics.threshold_at_cost(c[aside], chosen.outcome[aside], 10)
    expected = metrics.effective_reliability(c[~aside], judged.outcome[~aside], 10, threshold)
    assert numbers["rec_fog_1", "phi@10"] == pytest.approx(expected)
    own = {(n.task, n.metric): n.value for n in measure.measure(second, SETTINGS)}
    assert own["rec", "aurc"] == numbers["rec", "aurc"]
    assert own["rec", "brier_after_platt"] < numbers["rec", "brier_after_platt"]


def test_the_command_takes_a_calibrator_and_another_run(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / name, {"rec": answers(skill)}) for name, skill in (("a", 0.95), ("b", 0.75))]
    options = ["--calibrator", "beta", "--chosen-on", str(paths[0]), "--resamples", "20", "--json"]
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "metrics", str(paths[1]), *options])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = {row["metric"]: row["value"] for row in json.loads(capsys.readouterr().out)[0]["metrics"]}
    first, second = map(logs.read_one, paths)
    settings = measure.MeasurementSettings(resamples=20, calibrator="beta")
    expected = {number.metric: number.value for number in measure.measure(second, settings, chosen_on=first)}
    for name in ("ece_after_beta", "phi@10"):
        assert shown[name] == pytest.approx(expected[name])


def test_another_run_has_to_have_the_task_and_its_documents(tmp_path):
    run = logs.read_one(write(tmp_path / "a", {"rec": answers(0.8)}))
    fewer = logs.read_one(write(tmp_path / "b", {"rec": answers(0.8)[:-4]}))
    elsewhere = write(tmp_path / "c", {"other": answers(0.8)}, other={"test_split": "testB"})
    with pytest.raises(ValueError, match="expected the same documents in both runs"):
        measure.measure(run, SETTINGS, chosen_on=fewer)
    with pytest.raises(ValueError, match=r"expected task rec or the same on clean images in .*, got neither"):
        measure.measure(run, SETTINGS, chosen_on=logs.read_one(elsewhere))


def test_tiny_p_values_are_not_zero(tmp_path):
    runs = [logs.read_one(write(tmp_path / name, {"rec": answers(skill)})) for name, skill in (("a", 0.95), ("b", 0.1))]
    found = comparison.compare(*runs, SETTINGS)
    shown = io.StringIO()
    Console(file=shown, width=140).print(printed.flips_table(found.flips))
    assert "< 0.0001" in shown.getvalue()


def image_null(row):
    row["mean_iou"]["image"] = None


def id_null(row):
    row["mean_iou"]["id"] = None


def confidence_nan(row):
    row["mean_iou"]["confidence"]["coordinate_mean"] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (image_null, r"the image of document 6 in .*samples_rec\.jsonl:7, got None"),
        (id_null, r"the id of document 6 in .*samples_rec\.jsonl:7, got None"),
        (confidence_nan, r"confidence coordinate_mean in \[0, 1\] for 006 in .*samples_rec\.jsonl, got nan"),
    ],
    ids=["image", "id", "confidence"],
)
# As our tasks write logs there is something behind the record, and they are read as columns.
@pytest.mark.parametrize("behind", [{}, {"ece": [1]}], ids=["rows", "columns"])
def test_what_is_missing_is_no_value_of_its_own(tmp_path, behind, change, message):
    lines = answers(0.8)
    change(lines[6])
    folder = write(tmp_path, {"rec": [row | behind for row in lines]})
    with pytest.raises(ValueError, match=message):
        logs.read_one(folder)
    with pytest.raises(ValueError, match=message):
        report.read_folder(folder, SETTINGS)


def with_table(folder, **told):
    """A run whose table of results tells these metrics, too, by a task that was told to use another estimator."""
    write(folder, {"rec": [row | {"ece": [1]} for row in answers(0.8)]})
    file = next(folder.glob("*_results.json"))
    content = json.loads(file.read_text())
    content["results"]["rec"] |= {f"{name},none": value for name, value in told.items()}
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("estimator", ["coordinate_mean", "joint"])
def test_the_table_of_results_is_held_against_the_log(tmp_path, estimator):
    records = logs.read_one(write(tmp_path / "plain", {"rec": answers(0.8)})).tasks["rec"]
    c, y = records.confidence[estimator], records.outcome
    told = {"acc@0.5": y.mean(), "acc@0.9": 0.0, "parse_rate": 1.0, "ece": metrics.ece(c, y)}
    told |= {"brier": metrics.brier(c, y), "auroc": metrics.auroc(c, y), "aurc": metrics.aurc(c, y)}
    file = with_table(tmp_path / "told", **told)
    report.read_folder(file, SETTINGS)
    for name, value in told.items():
        edited = with_table(tmp_path / name, **(told | {name: value + 0.001}))
        both = rf"got {re.escape(name)} {value:.6f}.* says {value + 0.001:.6f} \({re.escape(str(edited))}\)"
        for read in (logs.read, lambda file: report.read_folder(file, SETTINGS)):
            with pytest.raises(ValueError, match=both):
                read(edited)
    log = logs.log_of(file, "rec")
    # The same answers with other confidences.
    log.write_text(log.read_text().replace(f'"{estimator}": 0.', f'"{estimator}": 0.0', 1))
    with pytest.raises(ValueError, match="expected the log of the same run"):
        logs.read(file)


def test_a_table_without_the_task_is_refused(tmp_path):
    file = with_table(tmp_path)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"results": {}}))
    with pytest.raises(ValueError, match=rf"expected the results of task rec in {re.escape(str(file))}, got none"):
        logs.read(file)
