"""Which runs the report takes together, and which unquantized run it compares them with."""

import json
import re
import shlex
from xml.etree import ElementTree

import pytest
from helpers import planted_logs, report_study

from lmms_plugin.analysis import measure
from lmms_plugin.analysis.axes import Config
from lmms_plugin.analysis.records import CLEAN
from lmms_plugin.report import building, page
from lmms_plugin.report.figures import drawing
from lmms_plugin.report.numbers import contents, results_folder
from lmms_plugin.report.numbers.summary import summarise

SETTINGS = measure.MeasurementSettings(resamples=20)
CLEAN_ONLY = {"shapes_rec": None}
FOG = CLEAN_ONLY | {"shapes_shift_fog_3": ("fog", 3)}
BOTH = FOG | {"shapes_shift_gaussian_noise_3": ("gaussian_noise", 3)}


def summary_of(folder):
    return summarise(results_folder.read_folder(folder, SETTINGS), SETTINGS.level)


def write(folder, name, skill, model, arguments, count=30, seed=0, tasks=CLEAN_ONLY, **more):
    """A run outside of a study."""
    docs = report_study.documents(count)
    return report_study.write_run(folder / name, docs, skill, seed, model, arguments, tasks=tasks, **more)


def write_cell(study, name, given, skill=0.8, seed=0, arguments=None, model=None, tasks=CLEAN_ONLY):
    """A cell of a study, with model arguments of its own."""
    file = report_study.write_cell(study, name, report_study.documents(30), given, skill, seed, tasks=tasks)
    about = study / "cells" / name / "cell.json"
    told = json.loads(about.read_text())
    told["model_args"] = arguments or {"pretrained": "demo"}
    told |= {"model": model or f"quant_{given['method']}", "tasks": list(tasks), "limit": None}
    about.write_text(json.dumps(told))
    return file


def lines_of(summary, method, condition=CLEAN):
    return [line for line in summary.lines if (line.config.method, line.condition) == (method, condition)]


def dense(*options):
    return Config("demo", "none", 16, None, "", "", options)


@pytest.mark.parametrize(
    ("options", "others", "expected"),
    [
        ((), [("dtype=float16",), ()], ()),
        (("dtype=float16",), [(), ("dtype=float16",)], ("dtype=float16",)),
        (("max_pixels=9",), [(), ("dtype=float16", "max_pixels=9")], ("dtype=float16", "max_pixels=9")),
        (("max_pixels=9",), [(), ("max_pixels=8",)], None),
        (("limit=20",), [()], None),
        ((), [("system_prompt=Be brief.",)], None),
        (("act_order=True",), [("dtype=float16",), ("attn_implementation=eager",)], ("attn_implementation=eager",)),
        ((), [], None),
    ],
    ids=["plain", "dtype", "asked alike", "asked otherwise", "limit", "prompt", "equally far: by name", "none"],
)
def test_the_nearest_16_bit_model_is_asked_the_same(options, others, expected):
    nearest = Config("demo", "rtn", 4, 128, "language", "", options).nearest(dense(*other) for other in others)
    assert (None if nearest is None else nearest.options) == expected


def test_each_model_is_compared_with_the_16_bit_model_of_its_own_question(tmp_path):
    write(tmp_path, "plain", 1.0, "quant_none", "pretrained=demo")
    write(tmp_path, "small", 0.4, "quant_none", "pretrained=demo,max_pixels=999")
    write(tmp_path, "rtn", 0.9, "quant_rtn", "pretrained=demo,bits=4", seed=1)
    write(tmp_path, "rtn_small", 0.3, "quant_rtn", "pretrained=demo,bits=4,max_pixels=999", seed=2)
    write(tmp_path, "rtn_odd", 0.3, "quant_rtn", "pretrained=demo,bits=4,max_pixels=5", seed=2)
    summary = summary_of(tmp_path)
    of = {line.config.options: line for line in summary.lines if not line.config.dense}
    for options in [(), ("max_pixels=999",)]:
        line = of[options]
        assert line.base is not None
        assert line.base.config.options == options
        assert line.delta.value == pytest.approx(line.group.of("accuracy") - line.base.group.of("accuracy"))
        assert line.flips.won - line.flips.lost == round(line.delta.value * line.flips.records)
    assert of["max_pixels=5",].base is None
    assert any("No unquantized run was asked" in said and "max_pixels=5" in said for said in page.warnings(summary))


def test_of_cells_that_ask_the_same_the_newest_counts(tmp_path):
    given = report_study.axes("rtn", 4)
    old = write_cell(tmp_path, "rtn-1", given, 0.1, 1, {"pretrained": "demo", "batch_size": 1})
    new = write_cell(tmp_path, "rtn-64", given, 0.9, 2, {"pretrained": "demo", "batch_size": 64})
    for file, date in ((old, "20260101_000000"), (new, "20260201_000000")):
        for one in file.parent.iterdir():
            one.rename(one.with_name(one.name.replace(report_study.DATE, date)))
        table = file.with_name(f"{date}_results.json")
        table.write_text(json.dumps(json.loads(table.read_text()) | {"date": date}))
    summary = summary_of(tmp_path)
    (line,) = summary.lines
    assert [run.axes.cell for run in line.runs] == ["rtn-64"]
    assert summary.superseded == 1
    assert any("1 older run" in said for said in page.warnings(summary))


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    for place, checkpoint in enumerate(("/a/demo", "/b/demo")):
        arguments = {"pretrained": checkpoint}
        write_cell(tmp_path, f"none-{place}", report_study.axes(), 0.9, place, arguments)
        write_cell(tmp_path, f"rtn-{place}", report_study.axes("rtn", 4), 0.8, 2 + place, arguments)
    summary = summary_of(tmp_path)
    assert sorted({line.config.model for line in summary.lines}) == ["demo (/a/demo)", "demo (/b/demo)"]
    for line in lines_of(summary, "rtn"):
        assert line.base.config.model == line.config.model


def test_a_ready_checkpoint_stays_beside_its_16_bit_model(tmp_path):
    write_cell(tmp_path, "none", report_study.axes(), 0.9, 0, {"pretrained": "/a/demo"})
    ready = report_study.axes("shipped", None)
    for place, path in enumerate(("/a/demo-awq", "/a/demo-gptq")):
        one = ready | {"bits": 4}
        write_cell(tmp_path, f"ready-{place}", one, 0.8, place, {"pretrained": path}, "quant_prequantized")
    lines = lines_of(summary_of(tmp_path), "shipped")
    assert [line.config.options for line in lines] == [("pretrained=/a/demo-awq",), ("pretrained=/a/demo-gptq",)]
    assert all(line.base.config.model == "demo" for line in lines)


def test_no_mean_is_taken_over_runs_with_unequal_tasks(tmp_path):
    write_cell(tmp_path, "none", report_study.axes(), 0.9, 0, tasks=BOTH)
    for seed, tasks in enumerate((BOTH, BOTH, FOG)):
        write_cell(tmp_path, f"awq-{seed}", report_study.axes("awq", 4, seed), 0.8, 1 + seed, tasks=tasks)
    summary = summary_of(tmp_path)
    (clean,) = lines_of(summary, "awq")
    assert [run.axes.seed for run in clean.runs] == [0, 1, 2]
    (shifted,) = lines_of(summary, "awq", "shifted")
    assert [run.axes.seed for run in shifted.runs] == [0, 1]
    assert (shifted.group.records, shifted.flips.records) == (2 * 30, 2 * 2 * 30)
    (fog,) = lines_of(summary, "awq", "shifted over shapes_shift_fog_3")
    assert [run.axes.seed for run in fog.runs] == [2]
    # The unquantized run has no mean over fog alone.
    assert fog.base is None
    assert any("shifted over shapes_shift_fog_3 is the mean over" in said for said in page.warnings(summary))


def test_the_order_of_tasks_makes_no_difference(tmp_path):
    for seed, tasks in enumerate((BOTH, dict(reversed(BOTH.items())))):
        write_cell(tmp_path, f"awq-{seed}", report_study.axes("awq", 4, seed), 0.8, 1 + seed, tasks=tasks)
    summary = summary_of(tmp_path)
    (shifted,) = lines_of(summary, "awq", "shifted")
    assert len(shifted.runs) == 2
    assert not summary.partial


def test_a_second_run_with_more_tasks_does_not_count_twice(tmp_path):
    first = report_study.axes("awq", 4, 0)
    write_cell(tmp_path, "awq-a", first, 0.8, 1)
    write_cell(tmp_path, "awq-b", first, 0.8, 1, tasks=FOG)
    (clean,) = lines_of(summary_of(tmp_path), "awq")
    assert len(clean.runs) == 1


def test_cells_that_were_mended_are_not_said_to_have_failed(tmp_path):
    given = report_study.axes("rtn", 4)
    write_cell(tmp_path, "rtn-new", given)
    for name, question in (("rtn-old", given), ("rtn-3-old", report_study.axes("rtn", 3))):
        folder = tmp_path / "failed" / name
        folder.mkdir(parents=True)
        (folder / "failed.json").write_text(json.dumps({"returncode": 1, "tail": "out of luck"}))
        (folder / "cell.json").write_text(json.dumps({"axes": question, "tasks": list(CLEAN_ONLY), "limit": None}))
    assert [failed.cell for failed in results_folder.read_folder(tmp_path, SETTINGS).failed] == ["rtn-3-old"]


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ("quant_prequantized", "pretrained=a/b-AWQ", ("a/b-AWQ", "prequantized", None, None)),
        ("qwen2_5_vl", "pretrained=a/b", ("a/b", "qwen2_5_vl", None, None)),
        ("qwen2_5_vl", "", ("qwen2_5_vl", "qwen2_5_vl", None, None)),
        ("quant_none", "", ("Qwen/Qwen2.5-VL-3B-Instruct", "none", 16, None)),
    ],
    ids=["ready", "another package's", "another package's default", "our default"],
)
def test_what_is_not_told_is_not_made_up(tmp_path, model, arguments, expected):
    write(tmp_path, "run", 0.9, model, arguments)
    (run,) = results_folder.read_folder(tmp_path, SETTINGS).runs
    assert run.axes.config[:4] == expected
    assert run.axes.config.dense == (model == "quant_none")


def test_a_16_bit_model_by_another_name_is_one(tmp_path):
    write_cell(tmp_path, "none", report_study.axes("bfloat16", 16), 0.9, model="quant_none")
    (run,) = results_folder.read_folder(tmp_path, SETTINGS).runs
    assert run.axes.config.dense


def test_a_task_of_which_only_the_held_out_part_was_run_is_left_out(tmp_path):
    def answered(k):
        record = {"image": f"i{k}", "id": str(k), "part": "val", "accuracy": 0.3, "question": "?", "answers": ["a"]}
        return {"doc_id": k, "accuracy": record | {"confidence": {"joint": 0.5}}}

    planted_logs.write(tmp_path / "run", {"rec": planted_logs.answers(0.8), "vqa": [answered(k) for k in range(12)]})
    (run,) = results_folder.read_folder(tmp_path, SETTINGS).runs
    assert (list(run.tasks), run.others) == (["rec"], ("vqa",))


LONG = "bitsandbytes+bnb_4bit_quant_type=nf4+bnb_4bit_use_double_quant=True"
"""A study's own name for a method with two options."""


@pytest.mark.parametrize("name", [LONG, "$x", r"$\frac{$", "a$b$c", "m" * 400, "a\x00b\ud800", "[/x]", "<b>&amp;"])
def test_any_name_can_be_drawn(tmp_path, name):
    study = tmp_path / "study"
    tasks = {"shapes_rec": None, "shapes_shift_fog_3": ("fog", 3)}
    write_cell(study, "none", report_study.axes(model=name), tasks=tasks)
    given = report_study.axes("rtn", 4, model=name) | {"method": name}
    write_cell(study, "rtn", given, skill=0.6, model="quant_rtn", tasks=tasks)
    (study / "cells" / "rtn" / "quant_report.json").write_text(
        json.dumps({"modules": [{"name": name, "relative_error": 0.1}]})
    )
    output, figures = tmp_path / "page.html", tmp_path / "figures"
    for _ in building.build(study, output, SETTINGS, title=None, figures=figures, pictures=0):
        pass
    assert output.read_bytes().decode().count("<svg class") > 5
    for file in figures.glob("*.svg"):
        ElementTree.parse(file)
    assert len([*figures.glob("*.png")]) == len([*figures.glob("*.svg")]) > 5


def test_a_short_name_keeps_what_tells_it_apart():
    names = [LONG, LONG.replace("True", "False"), LONG.replace("nf4", "fp4")]
    assert all(len(drawing.short(name)) == 30 for name in names)
    assert drawing.short(names[0]) != drawing.short(names[1])
    assert drawing.short("awq 4") == "awq 4"
    assert drawing.slug("m" * 400) != drawing.slug("m" * 401)
    assert len(drawing.slug("m" * 400)) == 69


@pytest.mark.parametrize(
    ("limit", "shown", "warned"), [(None, "all", False), (-1, "all", False), (0, "all", False), (0.01, "1 %", True)]
)
def test_all_documents_are_no_limit_and_a_share_is_one(tmp_path, limit, shown, warned):
    write(tmp_path, "run", 0.8, "quant_none", "pretrained=demo", limit=limit)
    summary = summary_of(tmp_path)
    assert [row[4].text for row in contents.runs(summary).rows] == [shown]
    assert any("stopped early" in line for line in page.warnings(summary)) == warned
    assert summary.lines[0].limited == warned
    options = summary.runs[0].axes.config.options
    assert options == (("limit=0.01",) if warned else ())


def test_commands_can_be_pasted_and_say_all_that_was_told(tmp_path):
    folder = tmp_path / "it's $HOME"
    file = write(folder, "one", 0.8, "quant_rtn", "pretrained=my models/$x,bits=3", limit=20)
    content = json.loads(file.read_text())
    content["config"]["batch_size"] = "64"
    file.write_text(json.dumps(content))
    write(folder, "two", 0.7, "quant_none", "pretrained=demo")
    commands = [shlex.split(line) for line in page.commands(summary_of(folder))]
    head = ["lmms-eval", "--model"]
    assert [
        *head,
        "quant_none",
        "--model_args",
        "pretrained=demo",
        "--tasks",
        "shapes_rec",
        "--log_samples",
    ] in commands
    given = [*head, "quant_rtn", "--model_args", "pretrained=my models/$x,bits=3", "--tasks", "shapes_rec"]
    assert [*given, "--log_samples", "--batch_size", "64", "--limit", "20"] in commands


def test_one_is_one_on_the_page(tmp_path):
    write(tmp_path, "one", 0.8, "quant_rtn", "pretrained=demo,bits=3", count=1, limit=1)
    lines = building.build(tmp_path, tmp_path / "page.html", SETTINGS, title=None, figures=None, pictures=0)
    assert next(lines).startswith(f"{tmp_path / 'page.html'}: 1 run, ")
    html = (tmp_path / "page.html").read_text()
    assert "1 command<" in html
    assert "1 of 1 run stopped early" in html
    assert re.findall(r"\b1 (?:runs|images|commands|rows|tasks|configurations)\b", html) == []
