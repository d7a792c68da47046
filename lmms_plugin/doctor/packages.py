"""Installed distributions against the bounds they set one another and against the lock."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import lmms_plugin
from lmms_plugin.doctor.rows import DiagnosisRow, fail, ok, warn

OURS = "lmms-plugin"
LOCK = "share/lmms-plugin/constraints.txt"
_SHOWN = 4


@dataclass(frozen=True)
class Package:
    """An installed distribution.

    Attributes:
        name: As it calls itself.
        version: Empty where its metadata is damaged.
        requires: Its `Requires-Dist`.
        python: Its `Requires-Python`.
        extras: Its `Provides-Extra`.
    """

    name: str
    version: str
    requires: tuple[str, ...] = ()
    python: str = ""
    extras: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Bound(NamedTuple):
    """What one distribution asks of another.

    Attributes:
        by: The one that asks.
        requirement: What it asks.
        found: The other one as installed; None if it is not.
    """

    by: Package
    requirement: Requirement
    found: Package | None

    @property
    def met(self) -> bool:
        """Whether what is installed is what is asked for."""
        return self.found is not None and fits(self.found.version, self.requirement.specifier)


def installed() -> dict[str, Package]:
    """Return what is installed by normalized name; of several of one name the first on the path, as imports do."""
    found: dict[str, Package] = {}
    for one in metadata.distributions():
        about = one.metadata
        # Half-removed distributions leave folders without a name behind.
        if about is None or "Name" not in about:
            continue
        version, python = ((about.get_all(key) or [""])[0] for key in ("Version", "Requires-Python"))
        extras = tuple(about.get_all("Provides-Extra") or ())
        package = Package(about["Name"], version, tuple(one.requires or ()), python, extras)
        found.setdefault(canonicalize_name(package.name), package)
    return found


def fits(version: str, wanted: SpecifierSet) -> bool:
    """Return whether a version is within bounds; one that cannot be read is not."""
    try:
        return wanted.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def bounds(packages: Mapping[str, Package], root: str, extras: Collection[str] = ()) -> list[Bound]:
    """Return everything that a distribution, with extras, and all it depends on ask of one another."""
    found, seen = [], set()
    waiting = [(canonicalize_name(root), frozenset(extras))]
    while waiting:
        name, wanted = key = waiting.pop(0)
        if key in seen:
            continue
        seen.add(key)
        by = packages[name]
        for requirement in _active(by, wanted):
            other = canonicalize_name(requirement.name)
            bound = Bound(by, requirement, packages.get(other))
            found.append(bound)
            if bound.found is not None:
                waiting.append((other, frozenset(requirement.extras)))
    return found


def _active(package: Package, extras: Collection[str]) -> Iterator[Requirement]:
    for line in package.requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # of a form older than the standard: pip takes no notice of it either
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def unmet(found: Collection[Bound]) -> dict[str, list[Bound]]:
    """Return the bounds that are not met, by the name of what they are asked of."""
    by_name: defaultdict[str, list[Bound]] = defaultdict(list)
    for bound in found:
        if not bound.met and bound not in by_name[bound.requirement.name]:
            by_name[bound.requirement.name].append(bound)
    return {name: several for name, several in by_name.items() if several}


def explained(several: Collection[Bound]) -> str:
    """Say in words what is asked of one distribution, and what is installed."""
    asked = ", ".join(f"{bound.by} needs {bound.requirement.name}{bound.requirement.specifier}" for bound in several)
    other = next(iter(several)).found
    return f"{asked}; {'it is not installed' if other is None else f'{other} is installed'}"


def mending(name: str, found: Collection[Bound]) -> str:
    """Return the command that installs a version that all bounds on it allow."""
    asked = [
        bound.requirement for bound in found if canonicalize_name(bound.requirement.name) == canonicalize_name(name)
    ]
    every = {one for requirement in asked for one in requirement.specifier}
    tightest = [
        choose((one for one in every if one.operator == operator), key=lambda one: Version(one.version), default=None)
        for operator, choose in (("<", min), (">=", max))
    ]
    others = [one for one in every if one.operator not in ("<", ">=")]
    return f'pip install "{name}{",".join(sorted(map(str, filter(None, [*tightest, *others]))))}"'


def lock_file() -> Path | None:
    """Return the lock as installed, or of the checkout that is installed as editable; None where there is neither."""
    recorded = metadata.files(OURS) or ()
    found = [Path(str(file.locate())).resolve() for file in recorded if str(file).endswith(LOCK)]
    found.append(Path(lmms_plugin.__file__).resolve().parent.parent / Path(LOCK).name)
    return next((file for file in found if file.is_file()), None)


def locked(text: str) -> dict[str, Requirement]:
    """Return the versions of a lock that hold on this machine, by normalized name.

    Args:
        text: Lines ``name==version ; marker``; those that begin with `#` or `-` say nothing about versions.
    """
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(one.name): one for one in found if one.marker is None or one.marker.evaluate()}


def read_lock() -> dict[str, Requirement]:
    """Return what the installed lock says; nothing where there is none."""
    file = lock_file()
    return {} if file is None else locked(file.read_text(encoding="utf-8"))


def compared_with_lock(packages: Mapping[str, Package], lock: Mapping[str, Requirement]) -> list[str]:
    """Return where versions differ from the lock, ``name 2.0 (locked 1.0)``; what is not installed does not differ."""
    return [
        f"{packages[name]} (locked {str(one.specifier).removeprefix('==')})"
        for name, one in sorted(lock.items())
        if name in packages and not fits(packages[name].version, one.specifier)
    ]


def check_python() -> Iterator[DiagnosisRow]:
    """Compare this interpreter with the bound of this package."""
    wanted = SpecifierSet(installed()[OURS].python)
    message = f"{platform.python_implementation()} {platform.python_version()}, {platform.platform()}"
    if fits(platform.python_version(), wanted):
        yield ok("python", message)
    else:
        yield fail("python", f"{message}; {OURS} needs Python {wanted}", "make an environment with such a Python")


def check_bounds() -> Iterator[DiagnosisRow]:
    """Compare what is installed with what this package, and all that it depends on, ask for."""
    packages = installed()
    found = bounds(packages, OURS)
    problems = unmet(found)
    for name, several in problems.items():
        yield fail("packages", explained(several), mending(name, found))
    if not problems:
        names = {canonicalize_name(bound.requirement.name) for bound in found}
        yield ok("packages", f"{packages[OURS]}; all {len(names)} distributions it depends on are within bounds")


def check_lock() -> Iterator[DiagnosisRow]:
    """Compare what is installed with the versions that were tested together."""
    file = lock_file()
    if file is None:
        yield warn("lock", f"this installation of {OURS} holds no {Path(LOCK).name}", f"pip install {OURS} again")
        return
    packages, lock = installed(), read_lock()
    differing = compared_with_lock(packages, lock)
    common = len(lock.keys() & packages.keys())
    if not differing:
        yield ok("lock", f"all {common} versions are those that were tested together")
        return
    more = ", ..." if len(differing) > _SHOWN else ""
    yield warn(
        "lock",
        f"{len(differing)} of {common} versions are not those that were tested together: "
        f"{', '.join(differing[:_SHOWN])}{more}",
        f"if something does not work: pip install -c {file} {OURS}",
    )
