"""Work that may hang, such as reading a folder of a file server that is gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def in_daemon_thread(work: Callable[[], Result]) -> Result:
    """As asyncio.to_thread, but in a thread of its own: where nobody waits for it any more, it
    neither holds up the process's end nor takes a place from others."""
    done: Future[Result] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reading").start()
    return await asyncio.wrap_future(done)
