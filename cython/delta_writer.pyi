"""Writes a stream's deltas, each as soon as it has come and the one before it has left.

In place of a task that awaits the one and then the other: twice a message, a task's turn goes
through all the coroutines of an rpc's handler.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from zllm.native.pending import Delta, Pending

class DeltaWriter:
    """A stream's Waiter. `write` is gRPC's; its coroutine is driven by callbacks of the loop, and
    never by two at once."""

    def __init__(
        self,
        stream: Pending,
        encode: Callable[[Delta], bytes],
        write: Callable[[bytes], Coroutine[Any, Any, None]],
        loop: asyncio.AbstractEventLoop,
    ) -> None: ...
    def start(self, delta: Delta) -> asyncio.Future[None]:
        """Writes this one and all that follow. Done once the last one has left; fails as the stream
        or a write does."""
    def close(self) -> None:
        """Writes no more, and gives up a write that has not ended. To be called in any case: it
        unties the writer from its stream."""
    def done(self) -> bool: ...
    def set_result(self, result: Delta, /) -> None: ...
    def set_exception(self, exception: Exception, /) -> None: ...
