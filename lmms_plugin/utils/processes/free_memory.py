"""Memory of this machine that a process can still take."""

from __future__ import annotations

from pathlib import Path

import psutil

CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_host_bytes(group: Path = CONTROL_GROUP) -> int:
    """Return the bytes that are available without swapping, within the limit of a container where there is one.

    Args:
        group: Folder of this process's control group (version 2).
    """
    return min([int(psutil.virtual_memory().available), *_within(group)])


def total_host_bytes(group: Path = CONTROL_GROUP) -> int:
    """Return the bytes of the machine, or the limit of a container."""
    limit = _limit(group)
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def _within(group: Path) -> list[int]:
    limit = _limit(group)
    if limit is None:
        return []
    try:
        used = int((group / "memory.current").read_text())
        # Pages of files can be taken back.
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [max(0, limit - used + int(lines.get("inactive_file", 0)))]
    except (OSError, ValueError):
        return [limit]


def _limit(group: Path) -> int | None:
    try:
        text = (group / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
