"""Every distribution that is needed is declared, and what is installed is what is locked."""

import ast
import configparser
import json
import re
import subprocess
import sys
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.environments import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lmms_plugin.doctor import packages

# Installers, which no package needs to run, and ours, which is what is tested.
NOT_LOCKED = {"pip", "wheel", "lmms-plugin"}
# Imported by functions of lmms-eval that no evaluation calls: its own tests, judges behind web services, a logger.
NEVER_CALLED = {"boto3", "botocore", "pytest", "requests", "swanlab"}
# Part of every environment that holds pip, and named by setuptools itself.
OF_PYTHON = {"pkg_resources", "setuptools"}


class Import(NamedTuple):
    """One absolute import of another distribution's module."""

    module: str
    place: str
    optional: bool

    @property
    def top(self):
        return self.module.partition(".")[0]

    @property
    def private(self):
        return any(part.startswith("_") for part in self.module.split("."))


def declared_by_us():
    """Core requirements and those of every extra, by name."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def read(text):
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return {canonicalize_name(found.name): found for found in map(Requirement, filter(None, lines))}

    extras = {name: read(text) for name, text in setup["options.extras_require"].items()}
    return read(setup["options"]["install_requires"]), extras


def imports(path, folder):
    """Absolute imports of a file; those inside `try` are optional."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.rpartition(".")[2].startswith("_") else node.module for name in names]
        for name in names:
            yield Import(name, f"{path.relative_to(folder)}:{node.lineno}", id(node) in tried)


def foreign(found, own):
    return found.top not in sys.stdlib_module_names and found.top not in own and found.top not in OF_PYTHON


@pytest.fixture(scope="module")
def providers():
    """Distributions that provide each top-level module."""
    return {top: set(map(canonicalize_name, names)) for top, names in packages_distributions().items()}


@pytest.fixture(scope="module")
def of_lmms_eval():
    """What the modules of lmms-eval import that the main command loads."""
    script = (
        "import json, sys, lmms_eval.__main__, lmms_eval.evaluator, lmms_eval.models, lmms_eval.tasks;"
        "files = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'lmms_eval'];"
        "print('\\n' + json.dumps([f for f in files if f]))"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True).stdout
    files = list(map(Path, json.loads(shown.splitlines()[-1])))
    assert len(files) > 30
    folder = next(parent for parent in files[0].parents if parent.name == "lmms_eval").parent
    found = [found for file in files for found in imports(file, folder)]
    return [one for one in found if foreign(one, {"lmms_eval", "__main__"}) and one.top not in NEVER_CALLED]


@pytest.mark.slow
def test_what_lmms_eval_imports_undeclared_is_declared_here(of_lmms_eval, providers):
    theirs = {canonicalize_name(Requirement(line).name) for line in requires("lmms-eval") if "extra ==" not in line}
    core, _ = declared_by_us()
    missing = {
        f"{one.module} ({one.place})"
        for one in of_lmms_eval
        if not one.optional and not providers.get(one.top, set()) & (theirs | set(core))
    }
    assert not missing


@pytest.mark.slow
def test_distributions_whose_private_modules_lmms_eval_imports_have_an_upper_bound(of_lmms_eval, providers):
    core, _ = declared_by_us()
    private = {one.top for one in of_lmms_eval if one.private and one.top in providers and "__" not in one.module}
    assert {"filelock", "datasets"} <= private
    for top in private:
        (name,) = providers[top]
        assert any(bound.operator in ("<", "==") for bound in core[name].specifier), f"{name} has no upper bound"


def test_what_this_package_imports_is_declared(providers):
    core, extras = declared_by_us()
    needed = set(core) | {name for extra, names in extras.items() if extra not in ("dev", "docs") for name in names}
    sources = [path for top in ("lmms_plugin", "tasks", "quant_backends") for path in (ROOT / top).rglob("*.py")]
    found = [one for path in sources for one in imports(path, ROOT) if foreign(one, {"lmms_plugin"})]
    # An extra that this Python is too old for is not there to say which modules it provides.
    missing = {
        f"{one.module} ({one.place})"
        for one in found
        if not providers.get(one.top, {canonicalize_name(one.top)}) & needed
    }
    assert not missing


def test_what_is_installed_is_what_is_locked():
    held = packages.locked((ROOT / "constraints.txt").read_text())
    locked = {name: str(found.specifier).removeprefix("==") for name, found in held.items()}
    installed = {}
    for found in distributions():
        if "_vendor" in Path(str(found.locate_file(""))).parts:
            # What setuptools carries for itself; importing it puts that on the path.
            continue
        # The first on the path is the one that is imported.
        installed.setdefault(canonicalize_name(found.metadata["Name"]), Version(found.version).public)
    for name in NOT_LOCKED:
        installed.pop(name, None)
    differing = {
        name: f"locked {locked.get(name)}, installed {installed.get(name)}"
        for name in locked.keys() | installed.keys()
        if locked.get(name) != installed.get(name)
    }
    assert not differing, "run `make test`, which installs what is locked, or `make lock`, which locks anew"


def test_the_lock_names_no_place_to_install_from():
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"https?://|^-|@ ", lock, re.MULTILINE)
