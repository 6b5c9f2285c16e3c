"""What the service runs on: uvloop where it is installed, and a garbage collector held back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any


def run_on_loop(main: Coroutine[Any, Any, int]) -> int:
    """Runs it to its end, and returns what it returned."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return int(uvloop.run(main))


def spare_garbage_collection() -> None:
    """What was loaded stays: it is never looked through again, and young objects more rarely. With
    CPython's own thresholds the collector shows in a busy service's profile (decision 038)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
