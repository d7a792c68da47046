"""Checks of optional libraries: versions within bounds, and importable, where installed."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from packaging.utils import canonicalize_name

from lmms_plugin.doctor.packages import OURS, bounds, explained, installed, mending, unmet
from lmms_plugin.doctor.rows import DiagnosisRow, fail, ok, warn

_OF_GPUS = frozenset({"gemlite"})
"""Extras whose libraries ask for a GPU when they are imported."""

DEVELOPMENT = frozenset({"dev", "docs"})


def extras() -> tuple[str, ...]:
    """Return the extras of this package that runs can use, from its metadata."""
    return tuple(sorted(set(metadata.metadata(OURS).get_all("Provides-Extra") or ()) - DEVELOPMENT))


def check_extra(extra: str) -> Iterator[DiagnosisRow]:
    """Check the versions of one extra's libraries, and import them."""
    packages = installed()
    found = bounds(packages, OURS, [extra])
    base = bounds(packages, OURS)
    added = [bound for bound in found if bound not in base]
    direct = [bound for bound in added if bound.by.name == packages[canonicalize_name(OURS)].name]
    check, command = f"extra {extra}", f'pip install "{OURS}[{extra}]"'
    if not direct:
        yield warn(check, f"none of its libraries is made for Python {platform.python_version()}", "use another Python")
        return
    missing = [bound.requirement.name for bound in direct if bound.found is None]
    if missing:
        yield warn(check, f"{', '.join(missing)} not installed: what needs it cannot run", command)
        return
    problems = unmet(added)
    for name, several in problems.items():
        yield fail(check, explained(several), mending(name, found))
    if problems:
        return
    if extra in _OF_GPUS and not torch.cuda.is_available():
        yield ok(check, f"{', '.join(str(bound.found) for bound in direct)} is there, and needs a GPU to be imported")
        return
    names = {canonicalize_name(bound.requirement.name) for bound in direct}
    for top, owners in metadata.packages_distributions().items():
        if top.isidentifier() and not top.startswith("_") and names & set(map(canonicalize_name, owners)):
            importlib.import_module(top)
    said = ", ".join(str(bound.found) for bound in direct)
    yield ok(check, f"{said} can be imported")
