"""Explanation of import errors: which distribution is at fault."""

from __future__ import annotations

import ast
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lmms_plugin.doctor.packages import OURS, Package, fits, installed, lock_file, read_lock


def explained(error: BaseException) -> tuple[str, str | None]:
    """Return where an error comes from, and what to install against it.

    Returns:
        Message that names the distribution in which the error arose and, for an import, the one that lacks something;
        and the remedy, None for errors that no installation fixes.
    """
    packages = installed()
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if frames := traceback.extract_tb(error.__traceback__):
        said += f" (in {_place(frames[-1], packages)})"
    top = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if not top:
        return said, None
    culprit = _owner(top, packages)
    if culprit is not None:
        said += f"; {culprit} is installed"
    return said, _remedy(top, culprit, read_lock())


def import_late(module: ModuleType) -> None:
    """Run the imports of `late_imports` now, so that an error names their place."""
    for statement in late_imports(module):
        code = compile(ast.Module([statement], []), str(module.__file__), "exec")
        exec(code, {"__name__": module.__name__, "__package__": module.__package__})


def late_imports(module: ModuleType) -> Iterator[ast.stmt]:
    """Yield the imports that a module makes only when its functions are called.

    Those in a ``try`` are left out: the module works without them.
    """
    yield from _late(ast.parse(inspect.getsource(module)), within=False)


def _late(node: ast.AST, *, within: bool) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try):
            continue
        if within and isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from _late(child, within=within or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _place(frame: traceback.FrameSummary, packages: Mapping[str, Package]) -> str:
    path = Path(frame.filename)
    roots = [Path(entry) for entry in sys.path if entry and path.is_relative_to(entry)]
    if not roots:
        return f"{path}, line {frame.lineno}"
    inner = path.relative_to(max(roots, key=lambda root: len(root.parts)))
    owner = _owner(inner.parts[0].removesuffix(".py"), packages)
    return f"{inner}, line {frame.lineno}{f', of {owner}' if owner is not None else ''}"


def _owner(top: str, packages: Mapping[str, Package]) -> Package | None:
    names = [*metadata.packages_distributions().get(top, ()), top]
    return next((packages[key] for key in map(canonicalize_name, names) if key in packages), None)


def _remedy(top: str, culprit: Package | None, lock: Mapping[str, Requirement]) -> str:
    if culprit is None:
        known = lock.get(canonicalize_name(top))
        return f'pip install "{known.name}{known.specifier}"' if known is not None else _reinstalled()
    known = lock.get(canonicalize_name(culprit.name))
    if known is None:
        # Names vanish between major versions.
        return f'pip install "{culprit.name}<{Version(culprit.version).major}", or {_reinstalled()}'
    if fits(culprit.version, known.specifier):
        return f'pip install --force-reinstall --no-deps "{culprit.name}=={culprit.version}"'
    return f'pip install "{culprit.name}{known.specifier}"'


def _reinstalled() -> str:
    file = lock_file()
    return f"pip install -c {file} {OURS}" if file is not None else f"pip install {OURS} again"
