"""The service's end of the socket to an engine: no task and no future a message.

A ZeroMQ socket's descriptor tells of changes, not of messages: it is readable once something may
have come, and any other call on the socket may take that sign away unread (ZMQ_FD and ZMQ_EVENTS
in zmq_getsockopt(3)). So a wake-up reads until nothing is left, and every send looks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

MAX_MESSAGES = 256
"""Read at once, at most: then the loop's other work has its turn."""


class EngineSocket:
    """What is sent before anyone listens waits in line, without bound."""

    def __init__(self, address: str, routing_id: bytes) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.ROUTING_ID, routing_id)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.connect(address)
        self._descriptor = int(self._socket.get(zmq.FD))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_messages: Callable[[list[bytes]], None] = _ignore
        self._again: asyncio.Handle | None = None

    def listen(self, on_messages: Callable[[list[bytes]], None]) -> None:
        """From now on the running loop gives `on_messages` all that waits, in order."""
        self._on_messages = on_messages
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)
        self._look_again()

    def send(self, message: bytes) -> None:
        """At once, or in order as soon as the engine takes it. Once closed: dropped."""
        if not self._socket.closed:
            self._socket.send(message, zmq.NOBLOCK)
            self._look_again()

    def close(self) -> None:
        """Drops what was not sent yet."""
        if self._socket.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._descriptor)
        if self._again is not None:
            self._again.cancel()
        self._context.destroy(linger=0)

    def _look_again(self) -> None:
        # Not read here and now: who sends is not prepared to hear before send() returns.
        if self._loop is None or self._again is not None:
            return
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        messages: list[bytes] = []
        try:
            while len(messages) < MAX_MESSAGES:
                messages.append(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            pass
        else:
            self._look_again()
        if messages:
            self._on_messages(messages)


def _ignore(messages: list[bytes]) -> None:
    """Until someone listens nothing is read."""
