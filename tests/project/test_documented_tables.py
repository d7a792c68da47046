"""Tables of README.md and docs/ that repeat what the code says are what the code says."""

import itertools
import json
import re
from pathlib import Path

import pytest
from helpers import documented_tables
from helpers.report_study import documents

from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.export.every_eval_ever import EvaluationSource
from lmms_plugin.leaderboard.submission import Manifest
from lmms_plugin.protocol import response
from lmms_plugin.protocol.response import ForcedAnswer, Response, Token
from lmms_plugin.quant_backends import GGUF, SERVED, names
from lmms_plugin.quant_backends.checkpoints.own_format import SavedConfig
from lmms_plugin.selector.features import FeatureOrigin, Features
from lmms_plugin.tasks.grounding import comprehension
from lmms_plugin.tasks.registry import catalogue

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TASKS = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs" / "file_formats.md").read_text(encoding="utf-8")


def first_cells(text):
    """What stands in backticks in the first cell of each row."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def section(text, heading):
    (found,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def expanded(name):
    """All names that `a_{b,c}` stands for."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


# Planning 129 cells hashes what each of them depends on.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "plan" else ()) for name in documented_tables.TABLES]
)
def test_a_table_is_as_the_code_makes_it(name):
    _, make = documented_tables.TABLES[name]
    assert documented_tables.written(name) == make(), "run python tests/helpers/documented_tables.py"


def test_the_tables_say_what_each_name_means():
    assert (
        "| `bits` |  | Bits per weight of the language model, 2 to 8; 16 for untouched. |"
        in documented_tables.arguments()
    )
    assert "| `awq` | `clip` | `False` | Whether to narrow the range" in documented_tables.options()


def test_every_task_and_group_has_a_row():
    rows = [name for cell in first_cells(TASKS.split("\n## ")[0]) for name in expanded(cell)]
    assert sorted(rows) == [task.name for task in catalogue.tasks()]


def test_tasks_of_the_readme_are_tasks():
    shown = first_cells(section(README, "Tasks"))
    assert len(shown) > 10
    assert set(shown) <= {task.name for task in catalogue.tasks()}


def test_the_readme_has_every_model():
    assert first_cells(section(README, "Models")) == [f"quant_{name}" for name in (*names(), SERVED, GGUF)]


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_links_of_the_readme_lead_to_files():
    named = {link.partition("#")[0] for link in re.findall(r"\]\((docs/[^)]*)\)", README)}
    assert len(named) > 5
    assert [link for link in named if not (ROOT / link).is_file()] == []


def test_pages_that_the_code_names_are_there():
    kinds = (".py", ".yaml", ".j2", ".txt")
    folders = ("lmms_plugin", "quant_backends", "tasks", "bench", "studies", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in kinds]
    pattern = re.compile(r"(?<![\w/])docs/\w+(?:\.\w+)?")
    named = {page for file in files for page in pattern.findall(file.read_text(encoding="utf-8"))}
    assert "docs/metrics.md" in named
    assert [page for page in named if not (ROOT / page).exists()] == []


def test_files_that_pages_name_are_there():
    """`TASKS` is where the tasks are installed, and so is a folder of tasks alone."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pattern = re.compile(r"(?<![\w/.{<$])(?:(TASKS)/)?((?:[\w.-]+/)+[\w*.-]+\.(?:py|yaml|j2|txt|toml))\b")
    tops = {file.name for file in ROOT.iterdir() if file.is_dir()} | {file.name for file in (ROOT / "tasks").iterdir()}
    named = {
        (page.name, path)
        for page in pages
        for tasks, path in pattern.findall(page.read_text(encoding="utf-8"))
        if tasks or path.partition("/")[0] in tops
    }
    assert len(named) > 20
    assert [one for one in named if not any([*ROOT.glob(one[1]), *(ROOT / "tasks").glob(one[1])])] == []


def test_fields_of_the_trailer():
    assert set(first_cells(section(FORMATS, "The trailer of an answer"))) == response.FIELDS | response.OPTIONAL_FIELDS
    assert f"`{response.MARKER}`" in FORMATS


def test_keys_of_a_record():
    answered = Response(
        text="[0.1, 0.2, 0.3, 0.4]",
        tokens=(Token("[0.1, 0.2, 0.3, 0.4]", -0.1),),
        samples=("[0.1, 0.2, 0.3, 0.4]", "none"),
        statement="90",
        forced=ForcedAnswer((Token("none", -0.1),), (Token("none", -0.2),), (0.1,), (True,)),
    )
    record = comprehension.process_results(documents(1)[0], [answered.encode()], "joint")["mean_iou"]
    documented = set(first_cells(section(FORMATS, "Log of samples")))
    assert {"box", "confidence", "samples", "statement", "reference"} <= record.keys() <= documented
    beside = {"original_expression", "annotated", "reasoning", "stratum", "tags"}
    assert documented - record.keys() == beside


def test_tensors_of_features():
    text = section(FORMATS, "Features")
    assert tuple(first_cells(text)) == Features._fields
    assert all(f"`{name}`" in text for name in FeatureOrigin("", {}).to_dict())


def test_keys_of_our_own_checkpoints():
    layer = {"kind": "packed", "bits": 4, "group_size": 64, "symmetric": False}
    text = section(FORMATS, "Quantized checkpoint")
    keys = SavedConfig(layers={"a": layer}).to_dict().keys()
    assert set(first_cells(text)) - {"quantization_config"} == keys


def test_keys_of_a_manifest():
    written = json.loads(
        Manifest("1", EvaluationSource("a/b", "a", "third_party", "a", 0), MeasurementSettings(), {}).to_json()
    )
    (row,) = re.findall(r"^\| `manifest.json` \|.*$", FORMATS, re.MULTILINE)
    assert all(f"`{key}`" in row for key in written)
