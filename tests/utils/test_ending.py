"""How lmms-eval ends on an error of ours: one last line and status 2 in its command, the error itself in Python."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from helpers import photographs
from tqdm import tqdm

from lmms_plugin import registration
from lmms_plugin.ending import LINE, ends_the_command
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.utils.copies import DatasetError
from lmms_plugin.utils.reading.problems import refusal

COMMAND = str(Path(sys.executable).parent / "lmms-eval")


@pytest.mark.parametrize(
    ("argv", "ends"),
    [
        (["/usr/bin/lmms-eval", "--model", "quant_rtn"], True),
        (["/site-packages/lmms_eval/__main__.py", "--model", "quant_rtn"], True),
        (["lmms-eval", "--verbosity", "INFO"], True),
        (["lmms-eval", "--verbosity", "DEBUG"], False),
        (["lmms-eval", "--verbosity=DEBUG"], False),
        (["lmms-eval", "--config", "several.yaml"], False),
        (["/usr/bin/pytest"], False),
        (["/home/me/lmms-eval/mine.py"], False),
        ([""], False),
        ([], False),
    ],
)
def test_only_the_command_ends(monkeypatch, capsys, argv, ends):
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit if ends else ValueError) as ended, ends_the_command():
        raise ValueError("expected this,\ngot that")
    if ends:
        assert ended.value.code == 2
        assert capsys.readouterr().err == "lmms-plugin: expected this, got that (--verbosity DEBUG shows where)\n"


def test_several_errors_are_lines_of_which_the_last_ends_like_any_other(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    with pytest.raises(SystemExit), ends_the_command():
        raise refusal(["first", "second"])
    said = capsys.readouterr().err.splitlines()
    assert said == ["lmms-plugin: first", "lmms-plugin: second (--verbosity DEBUG shows where)"]
    assert LINE.search(said[-1]).group(1) == "second"


def test_progress_bars_end_above_the_last_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    bar = tqdm(total=11)
    with pytest.raises(SystemExit), ends_the_command():
        raise ValueError("expected this")
    bar.close()
    assert capsys.readouterr().err.splitlines()[-1].startswith("lmms-plugin: expected this")


def test_a_thread_leaves_the_end_to_whoever_waits_for_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])

    def work():
        with ends_the_command():
            raise ValueError("expected this")

    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit), ends_the_command():
        pool.submit(work).result()
    assert capsys.readouterr().err.count("expected this") == 1


def test_a_row_that_cannot_be_read_ends_the_command_whenever_it_is_asked_for(monkeypatch, capsys):
    rows = photographs.rows("testA")
    boxes = [*rows["bbox"][:4], [5000.0, 5.0, 50.0, 50.0], rows["bbox"][5]]
    documents = ExpressionDocs(rows.remove_columns("bbox").add_column("bbox", boxes))
    assert documents[0]["expression"] == "smiling face of the woman"
    with pytest.raises(DatasetError):
        list(documents.remove_columns("image"))
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    with pytest.raises(SystemExit) as ended:
        list(documents.remove_columns("image"))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "row 4 (COCO_train2014_000000000004_4.jpg): column 'bbox': expected" in line


@pytest.mark.slow
def test_the_real_command_ends_so_on_an_image_that_it_reaches_late(tmp_path):
    rows = photographs.rows("testA").cast_column("image", datasets.Image(decode=False)).to_list()
    rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:9000]
    folder = photographs.write(tmp_path / "copy")
    changed = datasets.Dataset.from_list(rows, features=photographs.FEATURES)
    changed.to_parquet(folder / "testA-00000-of-00001.parquet")
    command = [COMMAND, "--model", "quant_none", "--model_args", "pretrained=demo", "--tasks", "refcocoplus_rec_testA"]
    environment = {**os.environ, "LMMS_PLUGIN_REFCOCOPLUS": str(folder), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2, done.stdout + done.stderr
    told = f"lmms-plugin: task refcocoplus_rec_testA, document 9: LMMS_PLUGIN_REFCOCOPLUS={folder}: testA: row 4 "
    assert done.stderr.splitlines()[-1].startswith(told)
    assert "image file is truncated" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr


def test_bugs_and_memory_that_runs_out_are_no_errors_of_the_user(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    for kind in (TypeError, RuntimeError, MemoryError, KeyboardInterrupt):
        with pytest.raises(kind), ends_the_command():
            raise kind


def of_ours(doc, results):
    """Scores nothing."""


of_ours.__module__ = "lmms_plugin.tasks.grounding.comprehension"


@pytest.mark.parametrize(("ours", "value", "refused"), [(True, 2, True), (True, 0, False), (False, 2, False)])
def test_examples_are_refused_for_tasks_that_take_none(ours, value, refused):
    set_to = []
    set_config = registration.refusing_examples(lambda _, key, value, update: set_to.append((key, value, update)))
    task = SimpleNamespace(
        config=SimpleNamespace(task="shapes_rec", process_results=partial(of_ours) if ours else print)
    )
    if refused:
        with pytest.raises(ValueError, match=r"--num_fewshot: expected 0 or nothing, got 2: shapes_rec"):
            set_config(task, key="num_fewshot", value=value)
    else:
        set_config(task, key="num_fewshot", value=value)
    assert set_to == ([] if refused else [("num_fewshot", value, False)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model_args", "pretrained=demo,bits=99"], "lmms-plugin: bits must be an integer from 2 to 8"),
        (
            ["--model_args", "pretrained=demo", "--num_fewshot", "2"],
            "lmms-plugin: --num_fewshot: expected 0 or nothing",
        ),
    ],
)
def test_the_real_command_ends_with_one_line(tmp_path, commands, more, told):
    given = ("--model", "quant_rtn", "--tasks", "shapes_rec", "--limit", "1", *more)
    done = commands.run("lmms-eval", *given, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(told)
    assert "Traceback" not in done.stdout + done.stderr
