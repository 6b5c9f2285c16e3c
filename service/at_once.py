"""Two things that do not wait for each other."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

One = TypeVar("One")
Other = TypeVar("Other")


async def both(
    one: Coroutine[Any, Any, One], other: Coroutine[Any, Any, Other]
) -> tuple[One, Other]:
    """What they return. The first failure, like a cancel, ends the other one, and is raised when
    neither runs any more."""
    # A TaskGroup would do so too, but raises its failures as a group. gather would pass a cancel
    # on, and another one here would cut short what the first has them clean up.
    first, second = asyncio.create_task(one), asyncio.create_task(other)
    both_tasks = (first, second)
    try:
        done, _ = await asyncio.wait(both_tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in both_tasks:
            if task in done:
                task.result()
        return first.result(), second.result()
    finally:
        for task in both_tasks:
            task.cancel()
        await asyncio.wait(both_tasks)
        for task in both_tasks:
            if not task.cancelled():
                task.exception()  # where both fail, nobody else asks for the second
