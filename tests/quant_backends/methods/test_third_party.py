"""A quantizer that another package brings: installed by pip, found by its entry point, run by lmms-eval."""

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from lmms_plugin import quant_backends
from lmms_plugin.quant_backends.backend import Backend

# The page that shows how to add a quantizer is what is tested.
PAGE = Path(__file__).parents[3] / "docs" / "adding.md"
BACKEND = next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "Backend" in code)
PYPROJECT = """
[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "1.0"

[project.entry-points."lmms_plugin.quant_backends"]
{name} = "{module}:SignBackend"

[tool.setuptools]
py-modules = ["{module}"]
"""


def install(folder, *, package, module, name, code=BACKEND):
    """Build and install a package with pip, into a folder of its own; returns the folder."""
    source, target = folder / f"{package}-source", folder / f"{package}-installed"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT.format(package=package, module=module, name=name))
    (source / f"{module}.py").write_text(code)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signs")
    return install(folder, package="sign-quantizer", module="sign_quantizer", name="signs")


def run(folder, *command, cwd=None, check=True):
    """Run a command of this environment that sees the package in `folder` too; its output."""
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd or folder)
    output = done.stdout + done.stderr
    assert not check or done.returncode == 0, output
    return output


def command(name):
    return str(Path(sys.executable).parent / name)


def test_its_name_is_listed_without_importing_it(signs):
    script = """
    import sys
    from lmms_plugin.quant_backends import names
    assert names()[-1] == "signs", names()
    print([name for name in ("sign_quantizer", "torch") if name in sys.modules])
    """
    assert run(signs, sys.executable, "-P", "-c", textwrap.dedent(script)).strip() == "[]"


def test_its_class_and_its_options_are_found(signs):
    script = """
    from lmms_plugin.quant_backends import get, option_types
    print(option_types("signs"), get("signs", strength=2.0))
    """
    output = run(signs, sys.executable, "-P", "-c", textwrap.dedent(script))
    assert "{'strength': <class 'float'>} SignBackend(strength=2.0)" in output


@pytest.mark.slow
def test_the_command_lists_it(signs):
    line = next(line for line in run(signs, command("lmms-plugin"), "models").splitlines() if "quant_signs" in line)
    assert "Signs and a step, with an option of its own." in line


@pytest.mark.slow
def test_lmms_eval_runs_it(signs, tmp_path):
    arguments = f"pretrained=demo,strength=0.5,report={tmp_path / 'report.json'}"
    options = ["--tasks", "shapes_rec", "--limit", "2", "--output_path", str(tmp_path)]
    output = run(signs, command("lmms-eval"), "--model", "quant_signs", "--model_args", arguments, *options)
    assert list(tmp_path.rglob("*_results.json")), output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "signs"
    assert {module["bits"] for module in report["modules"] if module["method"]} == {2}


def register(monkeypatch, *points):
    found = EntryPoints(EntryPoint(name, value, quant_backends.ENTRY_POINTS) for name, value in points)
    monkeypatch.setattr(quant_backends, "entry_points", lambda group: found.select(group=group))


@pytest.mark.slow
def test_a_name_that_is_taken_is_an_error_that_names_both(tmp_path):
    folder = install(tmp_path, package="another-rtn", module="another_rtn", name="rtn")
    script = """
    from lmms_plugin.quant_backends import get, names
    assert names().count("rtn") == 1
    get("hqq")
    get("rtn")
    """
    output = run(folder, sys.executable, "-P", "-c", textwrap.dedent(script), check=False)
    last = output.strip().splitlines()[-1]
    assert last == (
        "ValueError: two quantization backends are called 'rtn': lmms_plugin.quant_backends.methods.rtn:RtnBackend and "
        "another_rtn:SignBackend of another-rtn"
    )


def test_two_packages_with_one_name_are_an_error_that_names_both(monkeypatch):
    register(monkeypatch, ("mine", "one.module:Mine"), ("mine", "other.module:Mine"))
    with pytest.raises(ValueError, match=r"called 'mine': one\.module:Mine of .* and other\.module:Mine of "):
        quant_backends.get("mine")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wrong", "pathlib:Path"),
        ("wrong", "json:dumps"),
        ("other", "lmms_plugin.quant_backends.methods.rtn:RtnBackend"),
    ],
    ids=["another class", "no class", "another name"],
)
def test_what_is_no_backend_of_that_name_is_refused(monkeypatch, name, value):
    register(monkeypatch, (name, value))
    with pytest.raises(ValueError, match=f"registers {value} as quantization backend '{name}'; expected a subclass"):
        quant_backends.get(name)


def test_unknown_names_are_compared_with_those_of_others_too(monkeypatch):
    register(monkeypatch, ("signs", "sign_quantizer:SignBackend"))
    with pytest.raises(ValueError, match=r"unknown quantization backend 'sign', did you mean 'signs'\? .*signs\)"):
        quant_backends.get("sign")


def test_built_in_backends_are_called_as_they_are_registered():
    for name in quant_backends.BACKENDS:
        kind = quant_backends.backend_class(name)
        assert issubclass(kind, Backend)
        assert kind.name == name


def test_every_backend_has_a_model_class():
    names = [quant_backends.class_name(name) for name in quant_backends.names()]
    assert len(set(names)) == len(names)
