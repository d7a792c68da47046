"""Who may import whom: every import is read, those within functions and those for type checkers included."""

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(str(files("lmms_plugin")))
OURS = "lmms_plugin"

QUANTIZERS = {
    "quant_backends.plans": "quant_backends.formats utils",
    "quant_backends.formats": "utils",
    "quant_backends.layers": "quant_backends.formats quant_backends.plans utils",
    "quant_backends.structure": "quant_backends.layers quant_backends.plans utils",
    "quant_backends.rotations": "quant_backends.layers quant_backends.plans",
    "quant_backends.extras": "utils",
    "quant_backends.statistics": "quant_backends.layers",
    "quant_backends.backend": "quant_backends.formats quant_backends.layers quant_backends.plans"
    " quant_backends.statistics",
    "quant_backends": "quant_backends.backend utils",
    "quant_backends.calibration": "demo protocol quant_backends quant_backends.backend quant_backends.layers"
    " quant_backends.plans quant_backends.statistics quant_backends.structure shifts shifts.image utils",
    "quant_backends.methods": "quant_backends.backend quant_backends.extras quant_backends.formats"
    " quant_backends.layers quant_backends.plans quant_backends.statistics quant_backends.structure utils",
    "quant_backends.quantization": "quant_backends.backend quant_backends.calibration quant_backends.layers"
    " quant_backends.rotations quant_backends.plans quant_backends.structure utils",
    "quant_backends.checkpoints": "protocol quant_backends.backend quant_backends.calibration quant_backends.extras"
    " quant_backends.formats quant_backends.layers quant_backends.methods quant_backends.plans"
    " quant_backends.quantization quant_backends.rotations quant_backends.structure utils",
}
TASKS = {
    "tasks.sources": "ending utils",
    "tasks.grounding": "confidence metrics protocol shifts shifts.image shifts.language tasks.sources utils",
    "tasks.registry": "shifts shifts.image shifts.language tasks.grounding utils",
    "tasks.retrieval": "metrics protocol tasks.sources utils",
    "tasks.captions": "confidence protocol tasks.grounding tasks.retrieval tasks.sources utils",
    "tasks.vqa": "confidence metrics protocol tasks.grounding tasks.sources utils",
}
MODELS = {
    "vlm.contracts": "protocol utils",
    "vlm.kv_cache": "quant_backends.plans quant_backends.rotations utils",
    "vlm.generation": "arguments confidence protocol quant_backends.backend quant_backends.calibration selector utils"
    " vlm.contracts vlm.kv_cache",
    "vlm.running": "protocol utils vlm.contracts vlm.generation",
    "vlm": "arguments ending protocol quant_backends quant_backends.checkpoints quant_backends.layers"
    " quant_backends.plans utils vlm.contracts vlm.generation vlm.kv_cache vlm.running",
    "vlm.served.options": "arguments utils",
    "vlm.served": "arguments protocol quant_backends.checkpoints quant_backends.extras utils vlm vlm.contracts"
    " vlm.generation vlm.running vlm.served.options",
}
STUDIES = {
    "study.file": "analysis arguments confidence demo metrics quant_backends quant_backends.backend"
    " quant_backends.calibration quant_backends.methods quant_backends.plans tasks.registry tasks.sources utils"
    f" vlm.served.options {OURS}",
    "study.store": "analysis utils",
    "study.verdicts": "analysis metrics study.file study.store utils",
    "study.run": "analysis arguments harness_log metrics quant_backends quant_backends.backend quant_backends.extras"
    " quant_backends.plans quant_backends.structure study.file study.store study.verdicts utils",
}
REPORTS = {
    "report.numbers": "analysis metrics quant_backends.plans utils",
    "report.figures": "analysis metrics report.numbers utils",
    "report": f"analysis demo report.figures report.numbers tasks.grounding tasks.registry utils {OURS}",
}
MAY_IMPORT: Mapping[str, frozenset[str]] = {
    room: frozenset(others.split())
    for room, others in {
        OURS: "analysis data_frames utils",
        "data_frames": "analysis",
        "demo": "",
        "utils": "",
        "metrics": "",
        "shifts": "utils",
        "shifts.image": "shifts utils",
        "shifts.language": "shifts utils",
        "protocol": "utils",
        "confidence": "metrics protocol utils",
        "ending": "utils",
        "harness_log": "ending utils",
        "side_by_side": "arguments harness_log quant_backends utils",
        **QUANTIZERS,
        "arguments": "demo quant_backends.backend quant_backends.calibration quant_backends.plans utils",
        "analysis": "arguments confidence metrics protocol quant_backends quant_backends.extras quant_backends.plans"
        " shifts utils",
        "selector": "analysis arguments confidence metrics utils",
        **TASKS,
        **MODELS,
        "registration": "ending quant_backends tasks.captions tasks.grounding tasks.registry tasks.retrieval"
        " tasks.sources tasks.vqa utils vlm.running",
        "quantize": "arguments quant_backends quant_backends.backend quant_backends.calibration"
        " quant_backends.checkpoints quant_backends.plans quant_backends.rotations utils vlm",
        "doctor": "quant_backends.layers quant_backends.methods quant_backends.plans registration tasks.captions"
        f" tasks.grounding tasks.retrieval tasks.sources tasks.vqa utils {OURS}",
        **STUDIES,
        **REPORTS,
        "export": "analysis arguments confidence protocol quant_backends quant_backends.checkpoints"
        " quant_backends.methods quant_backends.plans quant_backends.structure quantize registration tasks.registry"
        f" utils {OURS}",
        "leaderboard": f"analysis export quant_backends.plans utils {OURS}",
        "demo.run": "analysis demo harness_log quant_backends quant_backends.extras quant_backends.plans report"
        " shifts.image shifts.language tasks.grounding tasks.registry utils",
        "cli": "analysis demo.run doctor export leaderboard metrics quant_backends quantize report selector"
        " side_by_side study.file study.run study.verdicts tasks.registry utils",
    }.items()
}
"""Room, or module of its own → rooms that it may import besides itself. `demo` alone are the paths of its data."""

THIRD_PARTY = {"metrics": {"numpy", "scipy"}, "shifts": {"cv2", "numpy", "PIL"}}
"""Room → the libraries that it may use."""
TERMINAL = {"rich", "typer"}


class Import(NamedTuple):
    """One name that a module imports.

    Attributes:
        module: That imports it.
        name: Dotted; of this package the module that the name is of or in.
    """

    module: str
    name: str


def modules() -> dict[str, Path]:
    """Every module of the installed package: dotted name → file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[Import]:
    """All that a module imports, wherever in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            assert node.module
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in MODULES else node.module for name in inner]
    return {Import(module, name) for name in names if name != module}


IMPORTS = [one for module in MODULES for one in imports(module)]
WITHIN = [one for one in IMPORTS if one.name.partition(".")[0] == OURS]


def room_of(module: str) -> str:
    """The room that a module lies in: the longest name of one that it begins with."""
    name = module.removeprefix(f"{OURS}.")
    if name.startswith("demo."):
        return "demo.run"
    parts = name.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((one for one in names if one in MAY_IMPORT), "nowhere")


def sorted_or_told(graph: Mapping[str, Iterable[str]]) -> str | None:
    """The first circle in a graph; None where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " → ".join(error.args[1])
    return None


def test_every_module_lies_in_a_room() -> None:
    # Above study, tasks and report nothing but their sub-rooms and an empty module lie.
    empty = {f"{OURS}.study", f"{OURS}.tasks"}
    assert {module for module in MODULES if room_of(module) == "nowhere"} == empty
    assert not [one for one in IMPORTS if one.module in empty]


def test_every_room_is_there_and_named_once() -> None:
    assert {room_of(module) for module in MODULES} - {"nowhere"} == set(MAY_IMPORT)
    assert {other for others in MAY_IMPORT.values() for other in others} <= set(MAY_IMPORT)


def test_the_table_has_no_circle() -> None:
    assert sorted_or_told(MAY_IMPORT) is None


def test_modules_import_in_no_circle() -> None:
    graph = {module: {one.name for one in WITHIN if one.module == module} for module in MODULES}
    assert sorted_or_told(graph) is None


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_the_table_says_and_nothing_else(room: str) -> None:
    found = {one for one in WITHIN if room_of(one.module) == room and room_of(one.name) != room}
    assert not {one for one in found if room_of(one.name) not in MAY_IMPORT[room]}


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_what_is_pure_uses_few_libraries(room: str) -> None:
    used = {one for one in IMPORTS if room_of(one.module).partition(".")[0] == room and one not in WITHIN}
    libraries = {one for one in used if one.name.partition(".")[0] not in sys.stdlib_module_names}
    assert not {one for one in libraries if one.name.partition(".")[0] not in THIRD_PARTY[room]}


def test_only_commands_know_the_terminal() -> None:
    assert {room_of(one.module) for one in IMPORTS if one.name.partition(".")[0] in TERMINAL} == {"cli"}


def test_nobody_imports_the_commands() -> None:
    assert "cli" not in {other for others in MAY_IMPORT.values() for other in others}
    assert not [one for one in WITHIN if room_of(one.name) == "cli" != room_of(one.module)]


def test_a_circle_would_be_seen() -> None:
    assert sorted_or_told({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
