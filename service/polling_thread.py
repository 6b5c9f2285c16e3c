"""Keeps gRPC's polling thread from interrupting the event loop.

grpc.aio has a thread that waits for finished writes and tells the event loop of them. Each write
that the loop starts wakes it, and on a busy core the kernel gives a thread that wakes its turn at
once: two switches between threads a message. Under SCHED_BATCH it waits until the loop has nothing
to do or has used its slice, and then tells of all writes together (decision 038).
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

GRPC_TARGET = "_poll_wrapper"
"""What gRPC's thread runs, after which Python names it."""


def let_it_wait() -> None:
    """Once gRPC has a server. Needs no privilege; where the system has no such policy or gRPC no
    such thread, all is as it was."""
    if not hasattr(os, "SCHED_BATCH"):
        return
    for thread in threading.enumerate():
        if GRPC_TARGET in thread.name and thread.native_id is not None:
            with suppress(OSError):  # a sandbox that forbids it
                os.sched_setscheduler(thread.native_id, os.SCHED_BATCH, os.sched_param(0))
