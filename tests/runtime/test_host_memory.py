"""What the host's memory leaves, on machines and in containers that are written down here."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from zllm.runtime.host_memory import available_memory

MIB = 1024**2


def machine(system: Path, available_mib: int, cgroup: str, **files: int | str) -> Path:
    """`files`: by path below sys/fs/cgroup, with __ for /."""
    (system / "proc/self").mkdir(parents=True)
    kib = available_mib * 1024
    (system / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {kib} kB\n")
    (system / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = system / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return system


def test_on_this_machine_it_is_no_more_than_there_is() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, 500, "")) == 500 * MIB


def test_a_group_without_a_limit_leaves_what_the_machine_does(tmp_path: Path) -> None:
    files = {"memory.max": "max", "memory.current": 100 * MIB}
    assert available_memory(machine(tmp_path, 500, "0::/\n", **files)) == 500 * MIB


@pytest.mark.parametrize("own", ["/", "/system.slice/docker-abc.scope", "/user.slice/café"])
def test_a_container_may_see_its_own_group_as_the_root(tmp_path: Path, own: str) -> None:
    files = {"memory.max": 300 * MIB, "memory.current": 100 * MIB}
    assert available_memory(machine(tmp_path, 500, f"0::{own}\n", **files)) == 200 * MIB


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    system = machine(
        tmp_path,
        500,
        "0::/pods/one\n",
        **{
            "pods__one__memory.max": 400 * MIB,
            "pods__one__memory.current": 10 * MIB,
            "pods__memory.max": 300 * MIB,
            "pods__memory.current": 250 * MIB,
        },
    )
    assert available_memory(system) == 50 * MIB


def test_pages_of_files_that_nobody_looks_at_are_there_for_the_taking(tmp_path: Path) -> None:
    files = {
        "memory.max": 300 * MIB,
        "memory.current": 280 * MIB,
        "memory.stat": f"anon {80 * MIB}\ninactive_file {200 * MIB}",
    }
    assert available_memory(machine(tmp_path, 500, "0::/\n", **files)) == 220 * MIB


def test_the_first_version_of_groups_has_a_mount_for_memory(tmp_path: Path) -> None:
    files = {
        "memory__docker__abc__memory.limit_in_bytes": 300 * MIB,
        "memory__docker__abc__memory.usage_in_bytes": 120 * MIB,
        "memory__docker__abc__memory.stat": f"inactive_file 0\ntotal_inactive_file {20 * MIB}",
    }
    groups = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n"
    assert available_memory(machine(tmp_path, 500, groups, **files)) == 200 * MIB


def test_a_group_that_uses_more_than_it_may_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": 100 * MIB, "memory.current": 120 * MIB}
    assert available_memory(machine(tmp_path, 500, "0::/\n", **files)) == 0
