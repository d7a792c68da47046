"""Functions are short enough to be read at once."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 50
"""Lines of a function, signature and docstring included."""
EXCEPTIONS = {
    # Sixteen arguments, each with its line in the docstring: signature and docstring alone are longer.
    ("quant_backends/checkpoints/loading.py", "prepare"): 90,
}


@pytest.mark.parametrize("folder", ["lmms_plugin", "quant_backends", "tasks"])
def test_no_function_is_longer_than_a_screen(folder):
    long, seen = {}, set()
    for file in sorted((ROOT / folder).rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                seen.add((place, node.name))
                lines = node.end_lineno - node.lineno + 1
                if lines > EXCEPTIONS.get((place, node.name), LONGEST):
                    long[f"{place}:{node.lineno} {node.name}"] = lines
    assert long == {}
    assert len(seen) > 200
    assert {key for key in EXCEPTIONS if key[0].startswith(f"{folder}/")} <= seen
