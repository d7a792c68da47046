"""Who may import whom: computations do not show, quantizers do not know tasks or how answers are decoded."""

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

PACKAGE = Path(str(files("lmms_plugin")))
SHOWING = {"cli", "commands", "display", "tables", "terminal"}
STILL_SHOWING = {"estimators", "reliability", "comparison"}
"""Modules that compute and show at once."""
QUANTIZERS_MAY = {
    *("boxes", "chat_templates", "demo", "dialects", "located", "plain_prompts", "prompts", "quant_backends"),
    *("readable", "reasoning", "response", "utils", "variables"),
}


def modules() -> dict[str, ast.Module]:
    """Every module of the installed package by its path below it."""
    found = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in found.items()}


def imported(tree: ast.Module) -> Iterator[str]:
    """Long names of what is imported, at the top of a module or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()


def of_ours(tree: ast.Module) -> set[str]:
    """Rooms, or modules of their own, of this package that are imported."""
    return {name.split(".")[1] for name in imported(tree) if name.startswith("lmms_plugin.")}


def test_only_what_commands_show_knows_the_terminal() -> None:
    found = {
        name
        for name, tree in MODULES.items()
        if {one.partition(".")[0] for one in imported(tree)} & {"rich", "typer"} and Path(name).stem not in SHOWING
    }
    assert {Path(name).stem for name in found} <= STILL_SHOWING


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("quant_backends/")])
def test_quantizers_know_no_task_and_no_decoding(name: str) -> None:
    tree = MODULES[name]
    # Corruptions of images belong to neither.
    shifts = {"lmms_plugin.shifts.image.corruptions", "lmms_plugin.shifts.severities"}
    of_tasks = {one.rpartition(".")[0] for one in imported(tree) if one.startswith("lmms_plugin.tasks")}
    assert of_tasks <= shifts
    assert of_ours(tree) - {"tasks"} <= QUANTIZERS_MAY


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("tasks/")])
def test_tasks_know_no_results_no_model_and_no_study(name: str) -> None:
    assert not of_ours(MODULES[name]) & {"results", "model", "quant_backends", "decoding", "study", "report", "export"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("utils/")])
def test_what_all_use_uses_nothing_else(name: str) -> None:
    assert of_ours(MODULES[name]) <= {"utils"}


def test_what_is_asked_and_answered_knows_no_confidence() -> None:
    for name in ("boxes", "dialects", "response", "prompts", "chat_templates", "reasoning"):
        assert not of_ours(MODULES[f"{name}.py"]) & {"confidence", "verbalised", "digits", "quant_backends", "tasks"}


def test_a_study_is_run_without_knowing_of_reports() -> None:
    for name in ("execution", "recording", "local", "on_ray"):
        assert "report" not in of_ours(MODULES[f"study/{name}.py"])
