"""Fingerprints of what a cell reads: checkpoints, data, code, versions."""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

from lmms_plugin.utils import hashing

PACKAGE = "lmms_plugin"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_SECONDS = 10


@cache
def revision(repository: str, kind: str) -> str | None:
    """Commit of a repository on the Hugging Face hub that would be read now; None where nothing tells.

    Args:
        repository: Its id.
        kind: `model` or `dataset`.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    # OSError and the error of the HTTP library, which is another one from version to version.
    unreachable = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    if not constants.HF_HUB_OFFLINE:
        try:
            found: str | None = HfApi().repo_info(repository, repo_type=kind, timeout=_HUB_SECONDS).sha
            return found
        # Without a network the copy on this machine is what is read.
        except unreachable:
            pass
    reference = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}" / "refs" / "main"
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None


def of_value(value: Any, kind: str = "dataset") -> Any:
    """A value as JSON can hold it, in which paths are replaced by what lies there and functions by their names.

    Args:
        value: Of a task's configuration or a model argument.
        kind: Of repositories on the hub, where a text is the id of one: `model` or `dataset`.
    """
    if isinstance(value, Mapping):
        return {str(name): of_value(one, kind) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [of_value(one, kind) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, partial):
        return [of_value(value.func), of_value(value.args), of_value(value.keywords)]
    if isinstance(value, str | Path):
        path = Path(value).expanduser()
        # A short text may be the name of something in the working directory by chance.
        if len(str(value)) < 1024 and os.sep in str(value) and path.exists():
            return hashing.of_path(path)
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, int | float | bool | None) else repr(value)


class Code(NamedTuple):
    """What code a cell runs.

    Attributes:
        files: Module of this package → fingerprint, comments and docstrings left out.
        versions: Distribution that one of them imports → version.
    """

    files: Mapping[str, str]
    versions: Mapping[str, str]


def code(roots: Iterable[str]) -> Code:
    """The modules of this package that the named ones import, directly or not, now or when a function is called.

    Args:
        roots: Long names of modules, of this package or not.

    Raises:
        ModuleNotFoundError: If one of them is to be in this package and is not, which would leave its code out.
    """
    roots = frozenset(roots)
    waiting, files, others = sorted(roots), {}, set()
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        if name.split(".")[0] != PACKAGE:
            others.add(name.split(".")[0])
            continue
        module = _module(name)
        if module is None and name in roots:
            raise ModuleNotFoundError(f"expected a module of this package, got {name!r}")
        if module is not None:
            files[name] = module.fingerprint
            waiting += [*module.imports, *_parents(name)]
    known = _distributions()
    owners = sorted({owner for name in others for owner in known.get(name, ())})
    return Code(dict(sorted(files.items())), {owner: version(owner) for owner in owners})


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


class CodeFile(NamedTuple):
    """What a file of code says.

    Attributes:
        fingerprint: SHA-256 of its syntax tree, without comments and docstrings.
        imports: Long names of what may be modules.
    """

    fingerprint: str
    imports: tuple[str, ...]


@cache
def _spec(name: str) -> ModuleSpec | None:
    parent = name.rpartition(".")[0]
    outer = _spec(parent) if parent else None
    # What is imported from a module that is no package is no module.
    return None if parent and (outer is None or outer.submodule_search_locations is None) else find_spec(name)


def _module(name: str) -> CodeFile | None:
    found = _spec(name)
    if found is None or not found.origin or not found.origin.endswith(".py"):
        return None
    path = Path(found.origin)
    return parsed_module(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def parsed_module(path: Path, changed: int, size: int) -> CodeFile:
    """Read a file of code; `changed` (ns since the epoch) and `size` (bytes) tell when what is remembered holds."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = tuple(dict.fromkeys(name for node in ast.walk(tree) for name in _imported(node)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [one for one in node.body if not _is_text(one)]
    return CodeFile(hashing.of_bytes(ast.dump(tree).encode()), imports)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        # What is imported from a package may be one of its modules.
        ours = node.module.split(".")[0] == PACKAGE
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names if ours)]
    return []


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def attribute(name: str) -> Any:
    """What a long name such as `lmms_plugin.demo.DATA` stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)
