"""Every name that a task's YAML gives can be searched for: it stands in the file of the module that it names."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
from helpers import natural_copies
from helpers.environments import ROOT

import lmms_plugin
from lmms_plugin.confidence.estimators import ESTIMATORS, TEXT_ESTIMATORS
from lmms_plugin.registration import tasks_folder
from lmms_plugin.shifts.language.rewording import TEXT_SHIFTS
from lmms_plugin.shifts.severities import SEVERITIES
from lmms_plugin.tasks.grounding import language_shifts, scored_by
from lmms_plugin.tasks.sources.data_source import DataSource, located
from lmms_plugin.tasks.sources.row_images import DatasetError
from lmms_plugin.tasks.vqa import answering

PACKAGE = Path(lmms_plugin.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FILES = [*sorted(Path(tasks_folder()).rglob("*.yaml")), *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = re.compile(r"!function\s+(lmms_plugin(?:\.\w+)+)\.(\w+)")
REFERENCES = sorted({found for file in FILES for found in REFERENCE.findall(file.read_text(encoding="utf-8"))})


@cache
def defined(file):
    """Names that a module's own statements bind."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    return names


def test_there_is_something_to_look_at():
    assert len(MODULES) > 200
    assert len(REFERENCES) > 100
    assert ("lmms_plugin.tasks.grounding.language_shifts", "keyboard_typos_2") in REFERENCES, "from the documentation"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_makes_its_attributes_up(file):
    assert "__getattr__" not in defined(file)


@pytest.mark.parametrize(("module", "name"), REFERENCES)
def test_a_name_in_a_yaml_stands_in_a_file(module, name):
    spec = find_spec(module)
    assert spec is not None
    assert name in defined(Path(spec.origin))


def test_every_estimator_has_its_scoring_function():
    for name in ESTIMATORS:
        assert getattr(scored_by, name).keywords == {"estimator": name}
    for name in TEXT_ESTIMATORS:
        assert getattr(answering, f"scored_by_{name}").keywords == {"estimator": name}


def test_every_language_shift_has_its_documents():
    for name in TEXT_SHIFTS:
        for severity in SEVERITIES:
            assert getattr(language_shifts, f"{name}_{severity}") == language_shifts.Reworded(name, severity)


@pytest.mark.usefixtures("registered")
class TestDataSource:
    class Folder:
        def load_arguments(self):
            return "parquet", {"data_files": "a", "name": "own"}

    def test_a_source_tells_path_and_arguments_and_the_task_has_the_last_word(self):
        assert isinstance(self.Folder(), DataSource)
        assert located(self.Folder(), None) == ("parquet", {"data_files": "a", "name": "own"})
        assert located(self.Folder(), {"name": "task's"}) == ("parquet", {"data_files": "a", "name": "task's"})

    def test_whatever_else_a_task_names_stays(self):
        assert located("somebody/set", None) == ("somebody/set", None)
        assert located(None, {"token": True}) == (None, {"token": True})

    def test_lmms_eval_asks_when_a_task_is_loaded(self, monkeypatch, tmp_path):
        from lmms_eval.api.task import TaskConfig

        from lmms_plugin.tasks.grounding.natural import dior_rsvg

        monkeypatch.setenv(dior_rsvg.variable, str(tmp_path))
        with pytest.raises(DatasetError, match=r"^toy: LMMS_PLUGIN_DIOR_RSVG=.*expected test\*\.parquet"):
            TaskConfig(task="toy", dataset_path=dior_rsvg)
        datasets.Dataset.from_list(natural_copies.rows("dior_rsvg")).to_parquet(tmp_path / "test.parquet")
        config = TaskConfig(task="toy", dataset_path=dior_rsvg)
        assert config.dataset_path == "parquet"
        assert config.dataset_kwargs == {"data_files": {"test": [str(tmp_path / "test.parquet")]}}
        monkeypatch.delenv(dior_rsvg.variable)
        assert TaskConfig(task="toy", dataset_path=dior_rsvg).dataset_path == "danielz01/DIOR-RSVG"
