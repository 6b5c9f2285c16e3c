"""What this process holds, counted before faults and after them. Blocks are the harness's count."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from dataclasses import dataclass

import psutil

MEMORY_SLACK_MIB = 16
"""An allocator does not give back every page; a leak of 16 KiB a fault shows in a thousand."""


@dataclass(frozen=True)
class Holdings:
    tasks: int
    descriptors: int
    memory_mib: float


def holdings() -> Holdings:
    gc.collect()
    return Holdings(
        tasks=len(asyncio.all_tasks()),
        descriptors=len(os.listdir("/proc/self/fd")),
        memory_mib=psutil.Process().memory_info().rss / 2**20,
    )


async def assert_given_back(before: Holdings, slack_mib: float = MEMORY_SLACK_MIB) -> None:
    """All that was taken since `before` is back, soon."""
    deadline = time.monotonic() + 10
    while True:
        after = holdings()
        if after.tasks <= before.tasks and after.descriptors <= before.descriptors:
            break
        assert time.monotonic() < deadline, f"{before} became {after}"
        await asyncio.sleep(0.05)
    assert after.memory_mib - before.memory_mib < slack_mib, f"{before} became {after}"
