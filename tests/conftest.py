"""Fixtures shared by all tests: one thread, no network, tiny checkpoints built once."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Calibrations that a test breaks off leave nothing in the user's cache.
os.environ["LMMS_PLUGIN_CACHE"] = ""

import pytest
from hypothesis import settings

# The same examples in every run: a test must not fail on a change that did not break it. To look for new ones:
# pytest --hypothesis-profile=search
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several test workers with several threads each slow one another down many times over."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a family to the directory of its tiny checkpoint, built on first use."""
    from families import build

    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp(family))
        return built[family]

    return get


@pytest.fixture(scope="session")
def local_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds a small RefCOCO+ of real photographs, as a user's local copy would lie there."""
    import photographs

    return photographs.write(tmp_path_factory.mktemp("refcocoplus"))
