"""One name, one thing: no two classes of one name, and no two modules of one name that are about different things."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(str(files("lmms_plugin")))
MODULES = sorted(PACKAGE.rglob("*.py"))
SAME_SENSE = {
    "__init__.py": "what Python calls a package's own module",
    "aggregations.py": "metrics as lmms-eval's aggregations, for each kind of task",
}
"""Names that several modules may have → what each of them is."""


def classes(path: Path) -> Iterator[tuple[str, str]]:
    """Name and place of every class of a module, those within functions and classes too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            yield node.name, f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno}"


def held_twice(named: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Name → places of all that have it, for names of more than one."""
    places = defaultdict(list)
    for name, place in named:
        places[name].append(place)
    return {name: where for name, where in places.items() if len(where) > 1}


def test_no_two_classes_have_one_name() -> None:
    assert held_twice(one for path in MODULES for one in classes(path)) == {}


def test_no_two_modules_of_different_senses_have_one_name() -> None:
    twice = held_twice((path.name, path.relative_to(PACKAGE).as_posix()) for path in MODULES)
    assert twice.keys() == SAME_SENSE.keys(), twice


def test_all_rooms_are_looked_at() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in MODULES}
    assert {"analysis", "quant_backends", "study", "tasks", "vlm"} <= rooms
