"""How much of the host's memory a process could still take: of the machine's, and of what its
container may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Where a version of cgroups says what a group may use and uses."""

    mount: str
    limit: str
    usage: str
    reclaimable: str
    """The line of memory.stat that counts pages of files which nobody has looked at for long: they
    are used, and there for the taking."""


_V1 = _Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("", "memory.max", "memory.current", "inactive_file")


def available_memory(system: Path = Path("/")) -> int:
    """Bytes that could be had without swapping, and without being killed for them. `system` holds
    the machine's proc and sys."""
    return min([_of_the_machine(system), *_of_its_groups(system)])


def _of_the_machine(system: Path) -> int:
    for line in _read(system / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # Not Linux: half of what is installed.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _of_its_groups(system: Path) -> Iterator[int]:
    """What the process's cgroup leaves, and each that it is part of (cgroups(7))."""
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        mount = system / "sys/fs/cgroup" / files.mount
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            # A container may see its own group as the root, or the path that the host has for it.
            limit, usage = _read(folder / files.limit).strip(), _read(folder / files.usage).strip()
            if limit.isdigit() and usage.isdigit():  # else "max", or no group
                used = int(usage) - _count(folder / "memory.stat", files.reclaimable)
                yield max(int(limit) - used, 0)
            if folder == mount:
                break


def _count(path: Path, name: str) -> int:
    lines = (line.split() for line in _read(path).splitlines())
    return next((int(line[1]) for line in lines if line[0] == name), 0)


def _read(path: Path) -> str:
    """What stands in the file; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")  # groups have any names
    except OSError:
        return ""
