"""The key of a cell: a hash of everything that its results depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import Any

from lmms_plugin import __version__
from lmms_plugin.arguments import ModelArguments
from lmms_plugin.demo import DATA
from lmms_plugin.quant_backends import SERVED, backend_class
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.study.file import served_arms
from lmms_plugin.study.file.fingerprints import Code, code, of_value, revision
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.tasks import known, local_copies
from lmms_plugin.utils import hashing
from lmms_plugin.utils.variables import IMAGES

VERSIONS = ("lmms_eval", "torch", "transformers")
_ROOTS = ("lmms_plugin.vlm.wrapper", "lmms_plugin.registration")
_LENGTH = 12


@dataclass(frozen=True)
class Keyed:
    """A cell with its key.

    Attributes:
        cell: Cell of a study.
        parts: Values that the key is a hash of, by name, so that the difference of two keys can be named.
        versions: Versions of the most important libraries.
    """

    cell: Cell
    parts: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def key(self) -> str:
        """SHA-256 of the parts."""
        return hashing.of_value(self.parts)

    @property
    def id(self) -> str:
        """Name of the cell's folder: a readable prefix and the beginning of the key."""
        return f"{self.cell.slug}-{self.key[:_LENGTH]}"

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return the names of the parts that differ from another key."""
        return [name for name in sorted({*self.parts, *other}) if self.parts.get(name) != other.get(name)]


def keyed(cell: Cell, *, cuda: bool) -> Keyed:
    """Compute the key of a cell from the current state of this machine.

    Args:
        cell: Cell of a study.
        cuda: Whether it runs on a GPU, where numbers differ in their last digits.

    Raises:
        ValueError: lmms-eval knows no task of that name.
        FileNotFoundError: The checkpoint does not exist.
    """
    tasks = known(cell.tasks)
    roots = served_arms.ROOTS if cell.backend == SERVED else (*_ROOTS, backend_class(cell.backend).__module__)
    reached = _code(frozenset((*roots, *(name for task in tasks.values() for name in task.modules))))
    versions = {"lmms-plugin": __version__, **{name: version(name) for name in VERSIONS}}
    parts = {
        "model": cell.model,
        "model_args": {name: of_value(value) for name, value in cell.arguments.items() if name != "pretrained"},
        "checkpoint": _checkpoint(cell),
        "calibration": _calibration_data(cell),
        "tasks": {name: task.fingerprint for name, task in tasks.items()},
        "local copies": local_copies(os.environ),
        "limit": cell.limit,
        "batch_size": cell.batch_size,
        "processes": cell.resources.processes,
        "device": "cuda" if cuda else "cpu",
        "versions": {**reached.versions, **versions, "python": ".".join(platform.python_version_tuple()[:2])},
        "code": dict(reached.files),
    }
    # A variable that the user has set counts as one that the cell sets.
    if images := cell.images or os.environ.get(IMAGES):
        parts["images"] = images
    if cell.launch is not None:
        parts["launch"] = served_arms.dependencies(cell.launch)
    return Keyed(cell, parts, versions)


@cache
def _code(roots: frozenset[str]) -> Code:
    return code(sorted(roots))


def forget() -> None:
    """Clear the cache, so that the next key reads the code again."""
    _code.cache_clear()


def _checkpoint(cell: Cell) -> Mapping[str, Any]:
    arguments = ModelArguments.parse(cell.arguments, served_arms.options_of(cell.backend))
    return hashing.of_source(arguments.find_checkpoint(), partial(revision, kind="model"))


def _calibration_data(cell: Cell) -> Mapping[str, Any] | None:
    if "calibration" not in cell.arguments:
        return None
    spec = CalibrationSpec.parse(cell.arguments["calibration"])
    path = DATA if spec.source == "demo" else spec.path
    if path is None:
        return None
    return hashing.of_source(str(path), partial(revision, kind="dataset"))
