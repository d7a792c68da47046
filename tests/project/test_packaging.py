"""What a user installs, as wheel and editable, in an environment of its own."""

import ast
import configparser
import shutil
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from helpers.environments import ROOT, Environment

pytestmark = pytest.mark.slow
SETUP = ROOT / "setup.cfg"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing behind in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "demo_output", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, checkout, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp(request.param) / "venv")
    environment.install(*(["--editable"] if request.param == "editable" else []), str(checkout))
    return environment


def test_every_package_on_disk_is_declared():
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    declared = set(setup["options"]["packages"].split())
    mapped = {"tasks": "lmms_plugin.tasks", "quant_backends": "lmms_plugin.quant_backends"}
    on_disk = {
        ".".join([mapped.get(parts[0], parts[0]), *parts[1:]])
        for top in ("lmms_plugin", *mapped)
        for parts in (init.parent.relative_to(ROOT).parts for init in (ROOT / top).rglob("__init__.py"))
    }
    assert declared == on_disk


def test_nothing_is_imported_by_a_short_or_relative_name():
    for path in [p for top in ("lmms_plugin", "tasks", "quant_backends") for p in (ROOT / top).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} imports relatively"
                assert (node.module or "").split(".")[0] not in ("tasks", "quant_backends"), f"{path}:{node.lineno}"


def test_no_top_level_tasks_reaches_site_packages(installed):
    names = {entry.name for entry in installed.site.iterdir()}
    assert not names & {"tasks", "quant_backends", "tests", "bench", "demo_training"}
    out = installed.python(
        "-c", "import importlib.util as u; print(u.find_spec('tasks'), u.find_spec('quant_backends'))"
    )
    assert out.split() == ["None", "None"]


def test_data_files_are_installed(installed):
    script = (
        "from importlib.resources import files; from pathlib import Path;"
        "tasks = Path(str(files('lmms_plugin.tasks'))); demo = Path(str(files('lmms_plugin.demo')));"
        "print(*sorted(p.name for p in tasks.rglob('*.yaml')), *sorted(p.name for p in demo.rglob('*.*')))"
    )
    names = installed.python("-c", script).split()
    sources = {p.name for p in (ROOT / "tasks").rglob("*.yaml")}
    assert sources <= set(names)
    assert {"model.safetensors", "config.json"} <= set(names)
    assert any(name.endswith(".parquet") for name in names)


def test_the_lock_is_installed_and_held_once(installed, checkout):
    script = "from lmms_plugin.doctor import packages; print(packages.lock_file())"
    assert Path(installed.python("-c", script).strip()).read_text() == (checkout / "constraints.txt").read_text()
    copies = [path for path in checkout.rglob("constraints.txt") if "build" not in path.parts]
    assert copies == [checkout / "constraints.txt"]


def test_lmms_eval_lists_our_tasks(installed):
    out = installed.command("lmms-eval", "--tasks", "list", "--verbosity", "INFO")
    assert " - refcocoplus_shift_testB_gaussian_noise_3\n" in out
    assert " - shapes_rec\n" in out


def test_own_command_lists_tasks_and_models(installed):
    tasks = installed.command("lmms-plugin", "tasks")
    assert "refcocoplus_shift " in tasks
    assert "gaussian_noise_3" not in tasks.replace("e.g. shapes_shift_gaussian_noise_3", "")
    models = installed.command("lmms-plugin", "models")
    assert {line.split()[0] for line in models.splitlines() if line} >= {
        "quant_none",
        "quant_rtn",
        "quant_hqq",
        "quant_awq",
    }


def test_lmms_eval_runs_our_model_on_our_task(installed, tmp_path):
    args = ["--model", "quant_rtn", "--model_args", "pretrained=demo,bits=4", "--tasks", "shapes_rec", "--limit", "4"]
    out = installed.command("lmms-eval", *args, "--output_path", str(tmp_path))
    assert list(Path(tmp_path).rglob("*_results.json")), out


def test_entry_point_of_the_running_environment():
    (ours,) = [point for point in entry_points(group="lmms_eval.models") if point.name == "lmms_plugin"]
    assert ours.value == "lmms_plugin.registration:manifests"
