"""The report's numbers: read fast, measured as `lmms-plugin metrics` does, and never silently wrong."""

import csv
import io
import itertools
import json
import re

import numpy as np
import pytest
from helpers import planted_logs, report_study
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lmms_plugin.analysis import columns, comparison, logs, measure
from lmms_plugin.analysis.groups import METRICS
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.cli.main import main
from lmms_plugin.metrics.bootstrap import Interval
from lmms_plugin.report import gallery, page
from lmms_plugin.report.figures import all_figures as figures
from lmms_plugin.report.figures import drawing, inlined, palette, svg, tradeoffs, under_shift
from lmms_plugin.report.numbers import contents, results_folder, tables
from lmms_plugin.report.numbers.summary import summarise
from lmms_plugin.shifts.image.corruptions import SHIFTS
from lmms_plugin.utils.spreadsheets import comma_separated

SETTINGS = measure.MeasurementSettings(resamples=60)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return report_study.write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def summary(study):
    return summarise(results_folder.read_folder(study, SETTINGS), SETTINGS.level)


def line_of(summary, label, condition=CLEAN):
    return next(line for line in summary.scopes[0].under(condition) if line.config.label == label)


def run_of(study, cell):
    return logs.read_one(study / "cells" / cell)


@pytest.mark.parametrize("wanted", [None, SETTINGS.estimators], ids=["all", "some"])
def test_columns_are_what_parsing_row_by_row_gives(study, wanted):
    run = run_of(study, "rtn-2")
    for task, records in run.tasks.items():
        config, log = run.content["configs"][task], run.log(task)
        fast, slow = columns.read(task, config, log, wanted), logs.by_rows(task, config, log)
        assert (fast.place, fast.documents, fast.kind) == (slow.place, slow.documents, slow.kind)
        assert set(fast.confidence) == (set(slow.confidence) if wanted is None else {"coordinate_mean"})
        assert not records.parsed.all()
        for name in ("ids", "numbers", "images", "asked", "parts", "score", "outcome", "parsed"):
            np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))
        for name, values in fast.confidence.items():
            np.testing.assert_array_equal(values, slow.confidence[name])


def test_logs_of_the_same_documents_share_what_they_have_in_common(study, tmp_path):
    run, other = run_of(study, "rtn-2"), run_of(study, "none")
    config, log = run.content["configs"]["shapes_rec"], run.log("shapes_rec")
    one, same = columns.read("shapes_rec", config, log, None), other.tasks["shapes_rec"]
    assert one.ids is same.ids
    assert one.documents == same.documents
    assert not np.array_equal(one.score, same.score)
    with pytest.raises(ValueError, match="read-only"):
        one.ids[0] = "another"
    # In another order, or with another question, they are other documents to the reader.
    lines = log.read_text().splitlines(keepends=True)
    asked = lines[0].replace('"expression": "', '"expression": "a ')
    for changed in (lines[::-1], [asked, *lines[1:]]):
        file = tmp_path / "log.jsonl"
        file.write_text("".join(changed))
        fast, slow = columns.read("shapes_rec", config, file, None), logs.by_rows("shapes_rec", config, file)
        assert fast.ids is not one.ids
        assert fast.documents == slow.documents
        for name in ("ids", "numbers", "asked", "score", "parsed"):
            np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"box": [', '"boxed": ['),
        ('"expression": "', '"expression": 7, "said": "'),
        ('"target": [', '"target": null, "targeted": ['),
        ('"id": "', '"id": "\\ud800'),
        ('"confidence": {', '"confidence": {"another": 0.5, '),
        (', "confidence": {', ', "confidence": {}, "told": {'),
    ],
)
def test_rows_that_are_not_as_our_tasks_write_them_are_left_to_the_parser_of_rows(study, tmp_path, old, new):
    run = run_of(study, "rtn-2")
    changed = tmp_path / "log.jsonl"
    lines = run.log("shapes_rec").read_text().splitlines(keepends=True)
    begin = next(k for k, line in enumerate(lines) if old in line[line.index('"mean_iou": {') :])
    head, record, rest = lines[begin].partition('"mean_iou": {')
    lines[begin] = head + record + rest.replace(old, new, 1)
    # The first row says what to expect of the others.
    changed.write_text("".join([*lines[begin + 1 :], *lines[: begin + 1]]))
    with pytest.raises(columns.UnusualLogError):
        columns.read("shapes_rec", run.content["configs"]["shapes_rec"], changed, None)


def test_the_page_needs_no_resamples_once_they_are_summarised(study):
    folder = results_folder.read_folder(study, SETTINGS)
    summary = summarise(folder, SETTINGS.level)
    nothing = gallery.Gallery((), ())
    before = page.render(summary, "", None, nothing, "here")
    assert all(run.measured.resampled for run in folder.runs)
    for run in folder.runs:
        run.measured.resampled.clear()
    assert page.render(summary, "", None, nothing, "here") == before


def test_logs_of_our_tasks_are_read_as_columns(study, monkeypatch):
    def by_rows(*_):
        raise AssertionError("expected columns")

    monkeypatch.setattr(logs, "by_rows", by_rows)
    assert run_of(study, "rtn-2").tasks["shapes_rec"].ids.size == 90


def test_fingerprints_tell_other_questions_and_other_truths_apart(study, tmp_path):
    file = run_of(study, "none").file
    table = json.loads(file.read_text())
    log = logs.log_of(file, "shapes_rec")
    prints = set()
    for old, new in (("", ""), ('"expression": "', '"expression": "not '), ('"target": [0.', '"target": [0.1')):
        changed = tmp_path / "log.jsonl"
        changed.write_text(log.read_text().replace(old, new, 1))
        prints.add(columns.read("shapes_rec", table["configs"]["shapes_rec"], changed, None).documents)
    assert len(prints) == 3


def truncate(text):
    return text[:-400]


def lose_a_row(text):
    return text[text.index("\n") + 1 :]


def edit_a_score(text):
    return re.sub(r'("mean_iou": \{.{0,200}?"score": )[\d.]+', r"\g<1>0.123", text, count=1)


def repeat_a_document(text):
    first, _, *rest = text.splitlines(keepends=True)
    return "".join([first, first, *rest])


def lose_a_confidence(text):
    return re.sub(r', "confidence": \{[^}]*\}', "", text, count=1)


def leave_the_unit_interval(text):
    return re.sub(r'("coordinate_mean": )[\d.]+', r"\g<1>1.5", text, count=1)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (truncate, "damaged"),
        (lose_a_row, "expected 20 documents"),
        (edit_a_score, "expected the log of the same run"),
        (repeat_a_document, "once"),
        (lose_a_confidence, "expected a confidence"),
        (leave_the_unit_interval, r"in \[0, 1\]"),
    ],
)
def test_a_log_that_is_not_that_of_the_run_is_refused(tmp_path, damage, complaint):
    file = report_study.write_run(tmp_path, report_study.documents(20), 0.8, tasks={"shapes_rec": None})
    log = logs.log_of(file, "shapes_rec")
    log.write_text(damage(log.read_text()), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        results_folder.read_folder(tmp_path, SETTINGS)


def test_values_and_intervals_are_those_of_the_metrics_command(study, summary):
    numbers = {n.metric: n for n in measure.measure(run_of(study, "none"), SETTINGS) if n.task == "shapes_rec"}
    group = line_of(summary, "unquantized").group
    names = {"accuracy": "acc@0.5"} | {m: m for m in ("mean_iou", "parse_rate", "ece", "brier", "aurc", "auroc")}
    names |= {m: m for m in ("coverage@0.01", "coverage@0.05", "phi@1", "phi@10", "phi@100")}
    for metric, printed in names.items():
        number = numbers[printed]
        assert group.of(metric) == number.value, metric
        assert group.interval(metric) == (number.low, number.high), metric
    assert (group.records, group.images) == (numbers["acc@0.5"].records, numbers["acc@0.5"].images)


def test_differences_and_flips_are_those_of_the_compare_command(study, summary):
    found = comparison.compare(run_of(study, "none"), run_of(study, "rtn-2"), SETTINGS)
    line = line_of(summary, "rtn 2")
    changes = {change.metric: change for change in found.changes if change.task == "shapes_rec"}
    theirs = changes["acc@0.5"].difference
    assert line.delta.value == pytest.approx(theirs.value, abs=1e-12)
    assert line.delta.interval == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    flips = next(row for row in found.flips if row.task == "shapes_rec")
    assert line.flips == (flips.lost, flips.won, flips.records)


def test_a_shifted_line_is_the_mean_over_shifted_tasks_and_seeds(study, summary):
    line = line_of(summary, "awq 3", "shifted")
    assert [run.axes.seed for run in line.runs] == [0, 1]
    means = [
        measure.key_numbers(records, SETTINGS)["accuracy"]
        for seed in (0, 1)
        for task, records in run_of(study, f"awq-3-{seed}").tasks.items()
        if task != "shapes_rec"
    ]
    assert len(means) == 6
    assert line.group.of("accuracy") == pytest.approx(np.mean(means))
    low, high = line.group.interval("accuracy")
    assert low < line.group.of("accuracy") < high


def test_nothing_is_compared_across_different_documents(tmp_path):
    docs = report_study.documents(40)
    report_study.write_cell(tmp_path, "none", docs[:20], report_study.axes(), 0.9)
    report_study.write_cell(tmp_path, "rtn", docs[20:], report_study.axes("rtn", 3), 0.9)
    found = summarise(results_folder.read_folder(tmp_path, SETTINGS), 0.95)
    line = line_of(found, "rtn 3")
    assert line.flips is None
    assert line.delta is None


def test_processes_do_not_change_a_number(study, summary, monkeypatch):
    monkeypatch.setattr(results_folder, "ONE_PROCESS", 0)
    other = results_folder.read_folder(study, measure.MeasurementSettings(resamples=60, workers=2))
    for one, same in zip(summary.folder.runs, other.runs, strict=True):
        assert one.file == same.file
        for key, group in one.measured.groups.items():
            np.testing.assert_array_equal(group.value, same.measured.groups[key].value)
            np.testing.assert_array_equal(one.measured.resampled[key], same.measured.resampled[key])


@pytest.mark.slow
def test_figures_drawn_by_two_processes_are_the_same(summary, monkeypatch):
    monkeypatch.setattr(inlined, "ONE_PROCESS", 0)
    one, two = inlined.shown(summary, 1), inlined.shown(summary, 2)
    assert [(section, figure.wide, figure.narrow) for section, drawn in one.items() for figure in drawn] == [
        (section, figure.wide, figure.narrow) for section, drawn in two.items() for figure in drawn
    ]


def test_runs_outside_of_a_study_have_axes_from_their_arguments(tmp_path):
    docs = report_study.documents(20)
    report_study.write_run(tmp_path / "a", docs, 0.9)
    arguments = "pretrained=demo,bits=3,vision_bits=4,group_size=-1,calibration=demo,act_order=True,seed=5"
    report_study.write_run(tmp_path / "b", docs, 0.7, 1, "quant_gptq", arguments)
    report_study.write_run(tmp_path / "c", docs, 0.7, 1, "quant_rtn", limit=20)
    dense, gptq, rtn = (run.axes for run in results_folder.read_folder(tmp_path, SETTINGS).runs)
    assert dense.config.dense
    assert gptq.config == ("demo", "gptq", 3, -1, "language+vision:4", "demo", ("act_order=True",))
    assert gptq.seed == 5
    # The default of the backend, since nothing was said.
    assert rtn.config.bits == 4
    # Runs of the first documents only are told apart.
    assert rtn.config.options == ("limit=20",)


def test_the_front_holds_what_nothing_beats(summary):
    lines = summary.scopes[0].under(CLEAN)
    kept = contents.not_dominated(lines)
    for line in lines:
        mine = contents.objectives(line)
        better = [other for other in kept if all(a <= b for a, b in zip(contents.objectives(other), mine, strict=True))]
        assert better, line.config.label
        assert (line in kept) == all(contents.objectives(other) == mine for other in better)


def test_lmms_eval_is_not_called_by_the_commit_of_the_working_directory(tmp_path):
    file = report_study.write_run(tmp_path / "alone", report_study.documents(12), 0.9)
    cell = report_study.write_cell(tmp_path / "study", "none", report_study.documents(12), report_study.axes(), 0.9)
    for one in (file, cell):
        one.write_text(json.dumps(json.loads(one.read_text()) | {"lmms_eval_version": "main@0b608b4"}))
    told = json.loads((cell.parents[1] / "cell.json").read_text())
    told["versions"]["lmms_eval"] = "0.7.3"
    (cell.parents[1] / "cell.json").write_text(json.dumps(told))

    def versions(folder):
        return page.versions(summarise(results_folder.read_folder(folder, SETTINGS), SETTINGS.level))

    assert versions(tmp_path / "alone") == {logs.GIT_STATE: "main@0b608b4"}
    assert versions(tmp_path / "study") == {
        "lmms_eval": "0.7.3",
        "torch": "2.15.0",
        logs.GIT_STATE: "main@0b608b4",
    }


def test_the_front_is_told_only_where_something_is_beaten(summary):
    chosen = [(condition, summary.scopes[0].under(condition)) for condition in summary.scopes[0].conditions]
    alone = [(condition, contents.not_dominated(lines)) for condition, lines in chosen]
    assert tradeoffs.unbeaten(alone) == (
        "No configuration is beaten by another one in accuracy, AURC, memory and speed at once."
    )
    some = [condition for (condition, lines), (_, kept) in zip(chosen, alone, strict=True) if len(kept) < len(lines)]
    told = tradeoffs.unbeaten(chosen)
    assert [condition for condition, _ in chosen if f"{condition}: " in told] == some
    assert len(contents.front(summary).rows) == sum(len(kept) for condition, kept in alone if condition in some)


def extents(figure):
    """Text → its box in pixels, of all that is drawn inside the limits of its panel; and the figure's size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ticks = {
        id(tick.label1 if tick.label1.get_text() else tick.label2): axis
        for panel in figure.axes
        for axis in (panel.xaxis, panel.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    texts = [one for one in figure.findobj(Text) if one.get_text() and one.get_visible() and id(one) not in ticks]
    shown = [one for one in texts if one.axes is None or one.axes.get_visible()]
    return [(one.get_text(), one.get_window_extent(canvas.get_renderer())) for one in shown], figure.bbox


def is_cut(box, page_box):
    return box.x0 < 0 or box.y0 < 0 or box.x1 > page_box.width or box.y1 > page_box.height


@pytest.mark.parametrize("models", [1, 6, 8, 13])
def test_a_heat_map_for_a_phone_can_be_read(models):
    labels = [
        f"{name} {bits}" for bits in (4, 3) for name in ("ptqtp_weighted", "rtn", "awq", "hqq", "gptq", "mbq", "x")
    ]
    values = np.random.default_rng(0).uniform(-0.9, 0.1, (models, len(SHIFTS)))
    with rc_context(dict(drawing.STYLE)):
        figure = under_shift.tall_heat(values, labels[:models], [name.replace("_", " ") for name in SHIFTS])
        texts, page_box = extents(figure)
    assert figure.get_figwidth() == drawing.NARROW, "shown without shrinking it"
    assert sum(len(panel.texts) for panel in figure.axes) == values.size
    assert min(one.get_fontsize() for panel in figure.axes for one in panel.texts) >= 9
    for said, box in texts:
        assert not is_cut(box, page_box), said
    for panel in figure.axes:
        inside = sorted((one.get_window_extent() for one in panel.texts), key=lambda box: (box.y0, box.x0))
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(inside))


@pytest.mark.parametrize("across", [figures.PAGE, figures.PHONE])
def test_no_label_of_a_figure_is_cut(summary, across):
    for several in figures.every(summary, across).values():
        for drawn in several:
            texts, page_box = extents(drawn.figure)
            assert not [said for said, box in texts if is_cut(box, page_box)], drawn.name


def test_labels_of_marks_stand_apart():
    figure = Figure(figsize=(2, 2))
    panel = figure.subplots()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    tradeoffs.label_marks(
        panel, [(0.5, 0.5, "4"), (0.51, 0.51, "3"), (0.5, 0.52, "2"), (0.505, 0.5, "4"), (0.9, 0.9, "")]
    )
    FigureCanvasAgg(figure).draw()
    assert sorted(one.get_text() for one in panel.texts) == ["2", "3", "4"]
    boxes = [one.get_window_extent() for one in panel.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_tables_as_csv_have_columns_for_intervals():
    columns_ = (tables.Column("a_b & c", numeric=False), tables.Column("x"))
    rows = tables.rows_of([[tables.text("5 %"), tables.number(-0.5, Interval(-0.75, -0.25))]])
    table = tables.ReportTable("t", "Caption", columns_, rows)
    assert list(csv.reader(io.StringIO(table.csv()))) == [
        ["a_b & c", "x", "x low", "x high"],
        ["5 %", "-0.5", "-0.75", "-0.25"],
    ]


@pytest.mark.parametrize(
    "said", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"]
)
def test_no_spreadsheet_runs_what_a_table_says(said):
    columns_ = (tables.Column(said, numeric=False), tables.Column("x"), tables.Column("y"))
    row = [tables.text(said, note="note"), tables.number(-0.5), tables.TableCell("-1", "-1")]
    written = tables.ReportTable("t", "Caption", columns_, tables.rows_of([row])).csv()
    head, line = csv.reader(io.StringIO(written, newline=""))
    shown = said.replace("\r", "\n")
    assert head == [f"'{shown}", "x", "y"]
    assert line == [f"'{shown} (note)", "-0.5", "-1"]


def test_a_carriage_return_begins_no_line_of_its_own():
    assert list(csv.reader(io.StringIO(comma_separated([["a\r=1+1", "b"]]), newline=""))) == [["a\n=1+1", "b"]]


def test_figures_take_their_colours_from_the_page_and_their_ids_from_their_name(summary):
    drawn = [one for section in figures.every(summary).values() for one in section]
    assert {one.name.split("-")[0] for one in drawn} == {*figures.SECTIONS, "layers"}
    for one in drawn[:3]:
        body = svg.inline(one.figure, one.name, one.title, one.says)
        assert not any(tone.light in body for tone in palette.TONES.values())
        assert all(name.startswith(one.name) for name in re.findall(r'\bid="([^"]+)"', body))
        assert re.search(r'role="img" aria-labelledby="\S+-title" aria-describedby="\S+-desc"', body)
        assert svg.svg(one.figure) == svg.svg(one.figure)


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_colours_stand_out(ground):
    papers = [getattr(palette.SURFACES[name], ground) for name in ("paper", "tint")]
    for name, tone in {**palette.TONES, **palette.SURFACES}.items():
        if name in ("rule", "paper", "tint"):
            continue
        least = 4.5 if name in ("ink", "muted", "badtext", "s1") else 3.0
        assert min(contrast(getattr(tone, ground), paper) for paper in papers) >= least, name
    assert len({tone.light for tone in palette.TONES.values()}) == len(palette.TONES)


def test_every_quantizer_looks_different_and_the_same_everywhere():
    both = palette.looks(["awq", "rtn", "mine", "none"])
    assert len(set(both.values())) == 4
    assert both["awq"] == palette.looks(["awq"])["awq"]


@pytest.mark.slow
def test_the_command_writes_page_figures_and_tables(study, tmp_path, monkeypatch, capsys):
    (study / "verdict.json").write_text(
        json.dumps({"sentences": ["Nothing was shown."], "tables": [{"title": "T", "columns": ["a"], "rows": [["1"]]}]})
    )
    out, folder = tmp_path / "report.html", tmp_path / "figures"
    arguments = ["report", str(study), "-o", str(out), "--figures", str(folder), "--resamples", "20", "--pictures", "3"]
    monkeypatch.setattr("sys.argv", ["lmms-plugin", *arguments, "--workers", "1"])
    with pytest.raises(SystemExit, match="0"):
        main()
    html = out.read_text(encoding="utf-8")
    assert "Nothing was shown." in html
    assert "cells 1 failed and are missing" in html
    assert "ValueError: out of luck" in html
    assert html.count("lmms-eval --model quant_awq --model_args pretrained=demo") == 2
    assert html.count("data:image/jpeg;base64,") == 3
    # Everything is in the page: nothing is loaded from anywhere.
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#|&quot;#)|@import', html)
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.svg")}
    assert {"leader", "flips", "runs", *names} <= {path.stem for path in folder.glob("*.csv")}
    with (folder / "leader.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    assert all(float(row["Accuracy low"]) <= float(row["Accuracy"]) <= float(row["Accuracy high"]) for row in rows)


def test_a_reader_is_warned_of_limits_and_missing_baselines(tmp_path):
    report_study.write_run(
        tmp_path, report_study.documents(20), 0.7, 1, "quant_rtn", "pretrained=demo,bits=3", limit=20
    )
    found = list(page.warnings(summarise(results_folder.read_folder(tmp_path, SETTINGS), 0.95)))
    assert any("--limit" in line and "limit 20" in line for line in found)
    assert any("No unquantized run" in line for line in found)


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ('{"tables": []}', "sentences is missing"),
        ("{", "expected JSON in"),
        ('{"sentences": "one"}', "sentences must be a list, got 'one'"),
        ('{"sentences": [], "tables": [{"title": "T", "columns": ["a"]}]}', "tables[0]: rows is missing"),
        (
            '{"sentences": [], "tables": [{"title": "T", "columns": ["a"], "rows": [[1, 2]]}]}',
            "tables[0]: expected 1 value in every row, got 2",
        ),
    ],
)
def test_a_damaged_verdict_is_refused(tmp_path, told, problem):
    (tmp_path / "verdict.json").write_text(told)
    with pytest.raises(ValueError, match=r"verdict\.json") as refused:
        page.read_verdict(tmp_path)
    line = str(refused.value)
    assert problem in line
    assert "Error(" not in line
    assert "\n" not in line


def test_all_metrics_have_a_place(summary):
    assert line_of(summary, "unquantized").group.value.shape == (len(METRICS),)
    assert not np.isnan(line_of(summary, "unquantized").group.value).any()


def test_what_is_to_be_rejected_has_a_table_of_its_own(tmp_path):
    lines = planted_logs.pairs(0.1)
    run = logs.read_one(planted_logs.write(tmp_path / "run", {"rejection": lines}))
    numbers = {number.metric: number for number in measure.measure(run, SETTINGS)}
    alone = summarise(results_folder.read_folder(tmp_path, SETTINGS), SETTINGS.level)
    table = contents.rejection(alone)
    ours = ["rejection_auroc", "rejection_fpr@0.95", "confidence_falls", "box_rate_true", "box_rate_changed"]
    assert [column.title for column in table.columns[2:-1]] == [
        *("AUROC", "FPR@95", "Falls", "Box if true", "Box if changed")
    ]
    (row,) = table.rows
    assert [(cell.value, cell.low, cell.high) for cell in row[2:-1]] == [
        (numbers[name].value, numbers[name].low, numbers[name].high) for name in ours
    ]
    assert (row[1].text, row[-1].value, row[-1].note) == ("rejection", 120, "15 images")
    html = page.render(alone, "Rejection", None, gallery.build(alone, 4), "run")
    assert 'id="rejection"' in html
    assert 'id="leader"' not in html
    assert list(page.facts(alone).items())[:4] == [
        *(("run", "1"), ("configuration", "1"), ("task", "1"), ("answers", "120"))
    ]
    assert (
        "No pictures of any answer: no quantized run with boxes stands beside an unquantized one of the same model."
    ) in html
