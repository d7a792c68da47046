"""How lmms-eval ends on an error of ours: one last line and status 2 in its command, the error itself in Python."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmms_plugin import registration
from lmms_plugin.ending import ends_the_command

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
    set_config = registration._refusing_examples(lambda _, key, value, update: set_to.append((key, value, update)))
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
def test_the_real_command_ends_with_one_line(tmp_path, more, told):
    command = [COMMAND, "--model", "quant_rtn", "--tasks", "shapes_rec", "--limit", "1", *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith(told)
    assert "Traceback" not in done.stdout + done.stderr
