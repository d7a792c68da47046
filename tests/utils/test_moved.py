"""Names before 0.2.0 are refused with the new ones, wherever they are said."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from lmms_eval import utils as harness
from lmms_eval.tasks import TaskManager

import lmms_plugin
from lmms_plugin import registration
from lmms_plugin.utils.moved import MovedError, moved

PACKAGE = Path(lmms_plugin.__file__).parent
PACKAGES = [old for old in moved() if (PACKAGE / old.replace(".", "/") / "__init__.py").is_file()]
GONE = [old for old in moved() if old not in PACKAGES]


@pytest.mark.parametrize("new", sorted(set(moved().values())))
def test_every_new_name_is_that_of_a_module(new):
    assert find_spec(f"lmms_plugin.{new}") is not None


@pytest.mark.parametrize("old", GONE)
def test_a_module_that_moved_is_refused_with_its_new_name(old):
    with pytest.raises(ModuleNotFoundError, match=rf"^lmms_plugin\.{old} is lmms_plugin\.{moved()[old]} since"):
        importlib.import_module(f"lmms_plugin.{old}")


@pytest.mark.parametrize("old", PACKAGES)
def test_what_was_in_a_module_that_is_a_package_now_is_refused_with_its_place(old):
    package = importlib.import_module(f"lmms_plugin.{old}")
    with pytest.raises(AttributeError, match=rf"'process_results'; what was in it is in lmms_plugin\.{moved()[old]} "):
        _ = package.process_results
    assert not hasattr(package, "__wrapped__")


@pytest.mark.parametrize(
    ("function", "new"),
    [
        ("lmms_plugin.tasks.grounding.process_results", "lmms_plugin.tasks.grounding.comprehension"),
        ("lmms_plugin.tasks.grounding_metrics.ece", "lmms_plugin.tasks.grounding.aggregations"),
    ],
)
def test_a_task_of_somebody_else_that_says_an_old_name_learns_the_new_one(function, new, tmp_path):
    task = tmp_path / "task.yaml"
    task.write_text(f"task: mine\nprocess_results: !function {function}\n", encoding="utf-8")
    with pytest.raises(ImportError) as refused:
        harness.load_yaml_config(str(task))
    assert f"{new} since lmms-plugin 0.2.0" in str(refused.value.__cause__)
    assert isinstance(refused.value.__cause__, MovedError)


@pytest.mark.parametrize(
    ("function", "new"),
    [
        ("lmms_plugin.tasks.grounding.process_results", "lmms_plugin.tasks.grounding.comprehension"),
        ("lmms_plugin.tasks.grounding_metrics.ece", "lmms_plugin.tasks.grounding.aggregations"),
    ],
)
def test_lmms_eval_ends_on_an_old_name_with_one_line_and_status_2(function, new, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(f"task: mine\ndataset_path: parquet\nprocess_results: !function {function}\n")
    registration.make_tasks_visible()
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(sys, "argv", ["lmms-eval", "--tasks", "mine"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        manager.load_task_or_group(["mine"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lmms-plugin: ['mine']: !function: ")
    assert f"{new} since lmms-plugin 0.2.0" in line


def test_what_never_was_is_missing_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'lmms_plugin\.never'$"):
        importlib.import_module("lmms_plugin.never")
