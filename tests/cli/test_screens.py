"""Every command answers in one screen, in a sentence first; `--all` prints what the screen leaves out."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import planted_logs, report_study
from hypothesis import given
from hypothesis import strategies as st

from lmms_plugin.analysis import logs
from lmms_plugin.analysis.component_importance import ComponentGrid, ComponentSensitivity, Importance
from lmms_plugin.analysis.estimator_ranking import RankedEstimator
from lmms_plugin.cli import printed_tables
from lmms_plugin.cli.main import main
from lmms_plugin.cli.screens import analyses_screen, listings, metrics_screen
from lmms_plugin.cli.screens.screen import (
    HEIGHT,
    WIDTH,
    ScreenTable,
    cut_apart,
    labelled,
    listing,
    middle_cut,
    screen,
)
from lmms_plugin.cli.screens.verdict_screen import verdict_screen
from lmms_plugin.doctor.rows import fail, ok, warn
from lmms_plugin.selector.shift_strength import Strength
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.study.verdicts.conclusions import Conclusion

STUDIES = Path(__file__).parents[2] / "studies"
TASKS = {"shapes_rec": None}
TASKS |= {f"shapes_shift_{name}_{level}": (name, level) for name in SHIFTS for level in (3, 5)}
QUICK = ("--resamples", "20")
ENOUGH = ("--resamples", "100")
"""With fewer, no p is low enough to show anything."""


def expect_screen(text):
    lines = text.rstrip("\n").split("\n")
    assert len(lines) <= HEIGHT, text
    assert max(map(len, lines)) <= WIDTH, text
    answer = " ".join(lines[: lines.index("")] if "" in lines else lines)
    assert re.match(r"[A-Z0-9].*\.$", answer), answer
    return lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the demo's documents on 37 tasks, and each of them with two."""
    folder = tmp_path_factory.mktemp("runs")
    docs = report_study.documents(24)
    report_study.write_run(folder / "a", docs, 0.9, tasks=TASKS)
    report_study.write_run(
        folder / "b", docs, 0.7, 1, "quant_rtn", f"pretrained=demo,bits=3,plan={'x' * 90}", tasks=TASKS
    )
    return folder


@pytest.fixture
def printed(monkeypatch, capsys):
    def of(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr("sys.argv", ["lmms-plugin", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    return of


def test_metrics_of_many_tasks_are_of_groups(printed, runs):
    lines = expect_screen(printed("metrics", runs / "a", *QUICK))
    assert any(line.split()[:3] == ["36", "shifted", "tasks"] for line in lines)
    assert "--all" in lines[-1]
    everything = printed("metrics", runs / "a", *QUICK, "--all")
    assert all(task in everything for task in TASKS)
    assert {"smooth_ece", "ece_after_platt", "retained"} <= set(everything.split())


def test_metrics_of_few_tasks_have_a_row_each(printed, tmp_path):
    planted_logs.write_grid(tmp_path, 0.9)
    lines = expect_screen(printed("metrics", tmp_path, *QUICK))
    assert [line.split()[0] for line in lines if line.startswith("rec")] == list(planted_logs.CELLS)


def test_metrics_tell_that_an_option_shows_elsewhere(printed, tmp_path):
    planted_logs.write_grid(tmp_path, 0.9)
    assert "held-out" not in printed("metrics", tmp_path, *QUICK)
    assert "What is chosen or fitted on held-out" in printed("metrics", tmp_path, *QUICK, "--calibrator", "beta")


def test_several_runs_share_a_screen(printed, runs):
    lines = expect_screen(printed("metrics", runs, *QUICK))
    assert lines[0].startswith("2 runs were measured")
    assert [line.split()[0] for line in lines if line.startswith("quant_")] == ["quant_none", "quant_rtn"]


def test_compare_begins_with_the_verdict(printed, runs):
    lines = expect_screen(printed("compare", runs / "a", runs / "b", *ENOUGH))
    answer = " ".join(lines[: lines.index("")])
    assert answer.startswith("On shapes_rec, ")
    assert re.search("On the 36 shifted tasks of shapes_rec, (it|the second run) is less often right", answer)
    assert "From clean to shifted data it " in answer
    found = json.loads(printed("compare", runs / "a", runs / "b", *ENOUGH, "--json"))
    assert found.keys() == {"first", "second", "changes", "flips", "shifted", "corruption_errors", "groups"}
    (shifted,) = [one for one in found["groups"] if (one["condition"], one["metric"]) == ("shifted", "acc@0.5")]
    assert f"{shifted['second']:.3f} against {shifted['first']:.3f}" in answer
    everything = printed("compare", runs / "a", runs / "b", *ENOUGH, "--all")
    assert all(task in everything for task in TASKS)
    assert {"McNemar", "Holm", "interaction"} <= set(everything.split())


def test_the_margin_of_a_comparison_is_told_whole(printed, runs):
    lines = expect_screen(printed("compare", runs / "a", runs / "a", *QUICK, "--margin", "0.02"))
    assert "=: equal within ±0.02." in lines
    assert any(line.startswith("shapes_rec ") and line.endswith(" =") for line in lines)


def test_estimators_begin_with_the_best(printed, runs):
    lines = expect_screen(printed("estimators", runs / "a", *QUICK))
    (found,) = json.loads(printed("estimators", runs / "a", *QUICK, "--json"))
    of_clean = [one for one in found["estimators"] if one["task"] == "shapes_rec"]
    best = min(of_clean, key=lambda one: (one["aurc"], one["estimator"]))
    assert f"On shapes_rec, {best['estimator']} ranks answers best (AURC {best['aurc']:.4f}" in " ".join(lines)
    everything = printed("estimators", runs / "a", *QUICK, "--all")
    assert all(one["estimator"] in everything for one in of_clean)


def ranked(estimator, aurc):
    ends = (0.0, 1.0)
    return RankedEstimator(
        task="rec",
        estimator=estimator,
        records=8,
        missing=0,
        accuracy=0.9,
        auroc=0.9,
        aurc=aurc,
        ece=0.1,
        auroc_interval=ends,
        aurc_interval=ends,
        ece_interval=ends,
        ece_floor=0.1,
    )


@pytest.mark.parametrize(
    ("aurcs", "said"),
    [
        ({"first": 0.1, "mean": 0.2}, "first ranks answers best (AURC 0.1000, AUROC 0.900), before mean (0.2000)."),
        ({"first": 0.1, "mean": 0.10001}, "first ranks answers best (AURC 0.1000, AUROC 0.900), as well as mean."),
        (
            {"first": 0.1, "joint": 0.1, "mean": 0.1, "min": 0.3},
            "first ranks answers best (AURC 0.1000, AUROC 0.900), as well as joint and mean, before min (0.3000).",
        ),
        (
            {"first": 0.1, "joint": 0.1, "mean": 0.1, "min": 0.1},
            "first ranks answers best (AURC 0.1000, AUROC 0.900), as well as 3 others.",
        ),
    ],
    ids=["apart", "alike in print", "three alike", "all alike"],
)
def test_an_estimator_that_is_as_good_is_not_called_worse(tmp_path, aurcs, said):
    planted_logs.write(tmp_path, {"rec": planted_logs.answers(0.9)})
    run = logs.read_one(tmp_path)
    judged = [ranked(name, aurc) for name, aurc in aurcs.items()]
    lines = metrics_screen.estimators_screen([(run, judged)], 0.95).splitlines()
    assert " ".join(lines[: lines.index("")]) == f"On rec, {said}"


@pytest.mark.parametrize("study", ["kv_cache", "components_demo"])
def test_a_plan_is_its_axes_and_arms(printed, study):
    file = STUDIES / f"{study}.yaml"
    lines = expect_screen(printed("study", "plan", file))
    cells = json.loads(printed("study", "plan", file, "--json"))["cells"]
    assert lines[0].startswith(f"{len(cells)} cells: {len(cells)} missing")
    assert any(line.startswith("method ") for line in lines)
    if study == "components_demo":
        everything = printed("study", "plan", file, "--all")
        assert all(cell["id"] in everything.replace("\n", "") for cell in cells[:3])


def test_images_of_a_plan_are_told_where_no_power_says_how_many(printed, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("models: [demo]\ntasks: [shapes_rec]\nimages: 12\nmethods: [none]\n")
    assert "images            12 at random" in expect_screen(printed("study", "plan", file))


def test_a_misspelt_folder_of_a_plan_is_told(monkeypatch, tmp_path, capsys):
    file, folder = STUDIES / "kv_cache.yaml", tmp_path / "nowhere"
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "study", "plan", str(file), "--output", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr().err
    assert said == f"--output: nothing of a study is in {tmp_path / 'nowhere'}: every cell counts as missing\n"


def test_lists_of_models_and_tasks(printed):
    models, tasks = printed("models"), printed("tasks")
    expect_screen(models)
    assert "quant_gguf" in models
    assert len(printed("models", "--all").splitlines()) == int(models.split()[3])
    roots = [line.split()[0] for line in expect_screen(tasks)[4:-2]]
    everything = [line.split()[0] for line in printed("tasks", "--all").splitlines()]
    assert len(everything) == int(tasks.split()[3])
    assert all(any(name == root or name.startswith(f"{root}_") for root in roots) for name in everything)


def test_a_diagnosis_begins_with_what_is_wrong():
    rows = [ok(f"check {k}", "x" * 100) for k in range(30)]
    rows += [warn("hub", "no answer", "set " + "y" * 90), fail("lock", "z", "pip")]
    lines = expect_screen(listings.doctor_screen(rows, "A closing sentence."))
    assert "of 32 checks 1 failed and 1 warn" in " ".join(lines[:3])
    assert [line[:4] for line in lines if line[:4] in ("fail", "warn")] == ["fail", "warn"]
    fine = listings.doctor_screen(rows[:3], "A closing sentence.")
    assert fine.startswith("Everything that a run needs works: of 3 checks 0 failed")


def test_reports_begin_with_their_totals():
    table = ["component  method", "runs on " + "kernel, " * 60]
    lines = expect_screen(listings.report_screen("rtn: 4.25 bits per weight", table))
    assert lines[0] == "This is rtn: 4.25 bits per weight."
    assert "".join(lines).count("kernel") == 60


def test_too_few_resamples_to_show_anything_are_told(printed, runs):
    shown = " ".join(printed("compare", runs / "a", runs / "b", *QUICK).split())
    assert "With 20 resamples and 2 groups no p gets below 0.19: nothing can be shown" in shown
    assert "nothing can be shown" not in printed("compare", runs / "a", runs / "b", *ENOUGH)


def test_sensitivity_and_strength():
    grid = ComponentGrid("awq demo acc@0.5", ("vision", "language"), np.full((4, 2), 4), np.zeros(4))
    shares = [Importance("vision", 60, 62, 58, 60, 50, 70), Importance("language", 40, 38, 42, 40, 30, 50)]
    found = ComponentSensitivity(grid, 0.3, tuple(shares))
    lines = expect_screen(analyses_screen.sensitivity_screen([found]))
    assert lines[0].startswith("The bits of vision decide most of awq demo acc@0.5: 60 %")
    assert "too badly" in " ".join(lines)
    assert printed_tables.sensitivity_table(found).row_count == 2
    scores = {"accuracy": 0.5, "ece": 0.1, "aurc": 0.2}
    strengths = [Strength(f"task_{k}", k / 100, float("nan"), 9, scores) for k in range(60)]
    lines = expect_screen(analyses_screen.strength_screen(strengths))
    assert lines[0].startswith("Of 60 tasks, task_59 is furthest")
    assert re.fullmatch(r"\.\.\. and \d+ more tasks", lines[-3])


def test_an_analysis_is_its_sentences(tmp_path):
    told = [
        f"Arm {k} is more often right than arm {k + 1} on shifted images, by {k} points of accuracy." for k in range(30)
    ]
    found = Conclusion("Which?", told, ["a finding"], [], ["a note"], None)
    lines = expect_screen(verdict_screen([found], tmp_path / "verdict.md"))
    assert " ".join(lines[: lines.index("")]) == told[0]
    assert "more lines" in lines[-3]
    assert "verdict.md" in lines[-1]


class TestScreen:
    """What does not fit is counted, and nothing is wider or longer than a screen."""

    ROWS = tuple((f"name {k}", "1") for k in range(50))

    def test_rows_left_out_are_counted(self):
        lines = expect_screen(screen(["It is so."], [ScreenTable(("a", "b"), self.ROWS, "task")], (), "More: --all"))
        assert len(lines) == HEIGHT
        shown = sum(line.startswith("name") for line in lines)
        assert f"... and {50 - shown} more tasks" in lines

    def test_a_small_table_leaves_its_lines_to_a_large_one(self):
        small, large = ScreenTable(("a", "b"), self.ROWS[:2], "task"), ScreenTable(("c", "d"), self.ROWS, "run")
        lines = expect_screen(screen(["It is so."], [small, large], (), "More: --all"))
        assert len(lines) == HEIGHT
        assert not any("more task" in line for line in lines)

    def test_tables_that_do_not_fit_are_counted(self):
        tables = [ScreenTable(("a", "b"), self.ROWS, "task", f"run {k}") for k in range(20)]
        lines = expect_screen(screen(["It is so."], tables, (), "More: --all"))
        told = [line for line in lines if line.startswith("run ")]
        assert any(line.startswith(f"... and {20 - len(told)} more tables; run {len(told)}") for line in lines)

    def test_long_names_keep_both_ends(self):
        assert middle_cut("shapes_shift_gaussian_noise_3", 16) == "shapes…n_noise_3"
        assert middle_cut("short", 16) == "short"

    def test_names_that_differ_where_they_are_cut_are_numbered(self):
        start, end = "a" * 30, "z" * 30
        rows = [(f"{start}{middle}{end}", "1") for middle in ("one", "two", "one")]
        lines = expect_screen(screen(["It is so."], [ScreenTable(("run", "x" * 40), rows, "run")]))
        shown = [line.split()[0] + line.split()[1] for line in lines if line.startswith("aaa")]
        assert shown[0] == shown[2] != shown[1]
        assert [line.split()[1] for line in lines if line.startswith("aaa")] == ["(1)", "(2)", "(1)"]

    def test_labels_of_two_runs_read_differently(self):
        same = "pretrained=/models/" + "long/" * 20
        labels = [f"quant_rtn {same}a,bits=4,{'calibration=self,' * 4}", f"quant_rtn {same}b,bits=4,{'x' * 90}"]
        assert len(set(cut_apart([*labels, labels[0] + "y"], 40))) == 3
        assert all(len(one) <= 40 for one in cut_apart(labels, 40))
        first, second = labelled(("first:  ", "second: "), [labels[0], labels[0].replace("a,bits", "b,bits")])
        assert len(first) == len(second) == WIDTH
        assert first.removeprefix("first:  ") != second.removeprefix("second: ")
        titles = [ScreenTable(("a", "b"), self.ROWS[:1], "task", label) for label in labels]
        lines = expect_screen(screen(["It is so."], titles))
        assert len({line for line in lines if line.startswith("quant_rtn")}) == 2

    @given(st.lists(st.text("abc", max_size=12), max_size=12), st.integers(6, 10))
    def test_different_names_are_cut_to_different_texts(self, names, width):
        short = cut_apart(names, width)
        assert len(set(zip(names, short, strict=True))) == len(set(names))
        assert len({one for name, one in zip(names, short, strict=True)}) == len(set(names))
        assert all(len(one) <= width for one in short)

    def test_a_listing_cuts_lines(self):
        lines = expect_screen(listing(["It is so."], ["x" * 200] * 60, "model", "More: --all"))
        assert lines[-3] == f"... and {60 - 35} more models"
