"""docs/metrics.md has every number that a command or a results table can hold."""

import json
import pkgutil
import re
from pathlib import Path

import pytest
from helpers import planted_logs, report_study

from lmms_plugin.analysis import comparison, component_importance, estimator_ranking, measure
from lmms_plugin.cli import printed
from lmms_plugin.cli.main import main
from lmms_plugin.confidence.estimators import ESTIMATORS
from lmms_plugin.metrics.posthoc import CALIBRATORS
from lmms_plugin.quant_backends.plans.quant_report import ModuleReport, QuantReport
from lmms_plugin.registration import tasks_folder
from lmms_plugin.report import page
from lmms_plugin.report.gallery import Gallery
from lmms_plugin.report.numbers import contents, results_folder
from lmms_plugin.report.numbers.summary import summarise
from lmms_plugin.selector import shift_strength
from lmms_plugin.tasks.registry import task_files

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
SETTINGS = measure.MeasurementSettings(resamples=20)


def entries():
    """What stands in backticks in the first cell of a row."""
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def undocumented(names):
    known = entries()
    endings = sorted((name for name in known if name.startswith("_")), key=len, reverse=True)

    def has_entry(name):
        return name in known or any(name.endswith(end) and has_entry(name.removesuffix(end)) for end in endings)

    return sorted(name for name in names if not has_entry(name))


def test_the_page_is_read():
    assert {"ece", "nll", "coverage@0.01", "_verbalised", "C@1%", "Stderr_CLT"} <= entries()
    assert undocumented(["ece_after_platt", "coverage@0.05_selector", "new_number"]) == ["new_number"]


def test_metrics_of_every_task():
    files = [task_files.read(file) for file in Path(tasks_folder()).rglob("*.yaml")]
    of_tasks = [entry["metric"] for file in files for entry in file.get("metric_list", [])]
    of_groups = [entry["metric"] for file in files for entry in file.get("aggregate_metric_list", [])]
    assert len(set(of_tasks)) > 90
    assert undocumented([*of_tasks, *of_groups]) == []


def computing():
    """Name of each row → the functions that its last cell names, below this package unless they are lmms-eval's."""
    rows = re.findall(r"^\| (`[^|]*) \|.*\|([^|]*)\|$", PAGE, re.MULTILINE)
    found = {name: re.findall(r"`([^`]+)`", last) for name, last in rows}
    paths = {
        name: [one if one.startswith("lmms_eval.") else f"lmms_plugin.{one}" for one in each]
        for name, each in found.items()
    }
    return {name: each for name, each in paths.items() if not name.startswith("`_")}


def test_every_row_names_functions_that_exist():
    rows = computing()
    assert len(rows) > 60
    assert [name for name, functions in rows.items() if not functions] == []
    for path in sorted({path for functions in rows.values() for path in functions}):
        assert callable(pkgutil.resolve_name(path)), path
    assert rows["`ece`"] == ["lmms_plugin.metrics.calibration.ece"]


def test_what_metrics_and_compare_print(tmp_path):
    first, second = (planted_logs.write_grid(tmp_path / name, skill) for name, skill in (("a", 0.9), ("b", 0.8)))
    measured = {number.metric for number in measure.measure(first, SETTINGS)}
    assert {"smooth_ece", "e_aurc", "brier_within_bin", "ece_after_platt", "achieved_risk@0.01"} <= measured
    assert undocumented(measured) == []
    found = comparison.compare(first, second, SETTINGS)
    assert undocumented({row.metric for row in (*found.changes, *found.shifted)}) == []
    named = {name for name in found.corruption_errors[0]._fields if name.endswith("ratio")}
    assert undocumented(named) == []


def test_what_is_printed_of_rejection(tmp_path):
    measured = measure.measure(planted_logs.rejection(tmp_path, 0.1), SETTINGS)
    assert undocumented({number.metric for number in measured}) == []


def test_columns_of_the_report(tmp_path):
    summary = summarise(results_folder.read_folder(report_study.write_study(tmp_path, 30), SETTINGS), SETTINGS.level)
    numbers = {column.title for column in contents.leader(summary).columns if column.numeric}
    assert {"C@1%", "Φ1", "Δ unquantized"} <= numbers
    assert undocumented(numbers) == []
    said = contents.meanings(contents.every(summary))
    assert numbers - set(said) == set(), "explained on the page itself"
    shown = page.render(summary, "", None, Gallery((), ()), "here")
    assert all(f"<dt>{name}</dt><dd>{said[name]}" in shown for name in ("C@5%", "Φ1", "AURC"))


def test_columns_of_a_quantized_cache(tmp_path):
    report_study.write_run(tmp_path, report_study.documents(30), 0.9, model_args="pretrained=demo,kv_bits=4")
    (results,) = tmp_path.glob("*_results.json")
    content = json.loads(results.read_text())
    content["throughput"] |= {"avg_kv_bits_per_element": 6.44, "avg_kv_bytes": 53_568}
    results.write_text(json.dumps(content))
    table = contents.leader(summarise(results_folder.read_folder(tmp_path, SETTINGS), SETTINGS.level))
    shown = {column.title: cell.value for column, cell in zip(table.columns, table.rows[0], strict=True)}
    assert (shown["Bits/KV"], shown["KV kB"]) == (6.44, 53.568)
    assert undocumented({"Bits/KV", "KV kB"}) == []


def test_tables_say_where_their_numbers_are_explained(tmp_path, monkeypatch, capsys):
    planted_logs.write_grid(tmp_path, 0.9)
    monkeypatch.setattr("sys.argv", ["lmms-plugin", "estimators", str(tmp_path), "--resamples", "20"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.endswith("each number: docs/metrics.md\n")


def test_headings_of_the_other_tables(tmp_path):
    run = planted_logs.write_grid(tmp_path, 0.9)
    judged = printed.estimators_table(estimator_ranking.judge(run, SETTINGS), "", 0.95)
    names = [str(column.header) for column in judged.columns]
    assert undocumented({name.replace(" ", "_") for name in names} - {"task", "estimator"}) == []
    assert undocumented({*shift_strength.SCORES, *component_importance.MEASURES, "consensus", "MMD²", "Fréchet"}) == []


def test_endings_are_those_there_are():
    assert undocumented([f"ece_after_{name}" for name in CALIBRATORS]) == []
    assert {"expected_iou", "agreement", "verbalised"} <= set(ESTIMATORS)


def test_what_a_quantized_model_adds_to_the_results():
    layer = ModuleReport("layer", "language", (8, 8), "rtn", 4, 8, 0, 128, 40, 0.1, None, "dense", None)
    report = QuantReport("rtn", (layer,), 128, 40, 1.0, 20, "", None, {}, ())
    assert undocumented({f"avg_{name}" for name in report.totals()}) == []
