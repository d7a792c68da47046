"""Tests stand alone: none imports another one, and none reaches behind the public names of what is tested."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("lmms_plugin", "quant_backends", "tasks", "bench", "demo_training")
PRIVATE = re.compile(r"_[^\W_]\w*")
NAMED_TUPLE = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}
"""Public whatever they begin with: underscores keep them apart from fields."""


def parsed(folder: str) -> dict[str, ast.Module]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def is_private(name: str) -> bool:
    return bool(PRIVATE.fullmatch(name))


@cache
def private_names() -> frozenset[str]:
    """Of modules, functions, classes, methods and what is assigned to, anywhere in the code."""
    names = {name for folder in CODE for name in defined(parsed(folder))}
    return frozenset(filter(is_private, names)) - NAMED_TUPLE


def defined(modules: dict[str, ast.Module]) -> Iterator[str]:
    for file, tree in modules.items():
        yield Path(file).stem
        yield from of_scope(tree.body)
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        yield from (node.attr for node in attributes if isinstance(node.ctx, ast.Store))


def of_scope(body: list[ast.stmt]) -> Iterator[str]:
    """Names of a module or class; those within a function nobody can reach."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            yield from of_scope(node.body) if isinstance(node, ast.ClassDef) else ()
        else:
            names = (one for one in ast.walk(node) if isinstance(one, ast.Name))
            yield from (one.id for one in names if isinstance(one.ctx, ast.Store))


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def other_tests(tree: ast.Module) -> list[str]:
    names = [name for node in ast.walk(tree) for name in imported(node)]
    return [name for name in names if any(part.startswith("test_") for part in name.split("."))]


def reached_behind(tree: ast.Module) -> list[str]:
    """Private names of the code that are imported, read of anything but `self`, or named to something like `setattr`.

    A test does not say what an object is; so it is the name that counts.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.append(node.attr)
        elif isinstance(node, ast.Call):
            given = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            found += [text.rpartition(".")[2] for text in given if re.fullmatch(r"[\w.]+", text)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            ours = [name for name in imported(node) if name.startswith((*CODE, "helpers"))]
            found += [part for name in ours for part in name.split(".") if is_private(part)]
    return [name for name in found if name in private_names()]


def test_the_rules_tell_what_they_forbid() -> None:
    assert "_wrap" in private_names()
    assert other_tests(ast.parse("def f():\n    from test_results import write")) == ["test_results.write"]
    for code in (
        "from lmms_plugin.registration import _wrap",
        "registration._wrap",
        "run().made._wrap(1)",
        "monkeypatch.setattr(registration, '_wrap', None)",
        "monkeypatch.setattr('lmms_plugin.registration._wrap', None)",
    ):
        assert reached_behind(ast.parse(code)) == ["_wrap"], code
    assert reached_behind(ast.parse("self._wrap(sample._replace(answer='_wrap and so on'))")) == []


def test_no_test_imports_another() -> None:
    assert {file: names for file, tree in parsed("tests").items() if (names := other_tests(tree))} == {}


def test_no_test_reaches_behind_public_names() -> None:
    assert {file: names for file, tree in parsed("tests").items() if (names := reached_behind(tree))} == {}
