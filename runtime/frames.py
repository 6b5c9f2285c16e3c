"""Whole messages over a unix stream socket, whose either end never waits for the other.

A message goes out as its length, in four bytes, and its own. What the peer has no room for waits
here in order, without bound, until flush().
"""

from __future__ import annotations

import socket
from collections import deque

READ_BYTES = 1 << 18
"""Read at once, at most."""
SEND_BYTES = 1 << 16
"""What waits is sent in pieces of that size: the kernel's room is taken by messages, not bytes."""
_LENGTH_BYTES = 4


class Frames:
    """One end of a connected socket, which is its own from now on."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        connected.setblocking(False)
        self._heard = bytearray()
        self._waiting: deque[memoryview] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether flush() has something to do, once the socket may be written."""
        return bool(self._waiting)

    def read(self) -> list[bytes]:
        """What has come. Raises ConnectionError where the peer has gone."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionError("the peer has closed its end")
        heard = self._heard
        heard += data
        messages = []
        at = 0
        while len(heard) - at >= _LENGTH_BYTES:
            begin = at + _LENGTH_BYTES
            end = begin + int.from_bytes(heard[at:begin], "little")
            if end > len(heard):
                break
            messages.append(bytes(heard[begin:end]))
            at = end
        del heard[:at]
        return messages

    def write(self, message: bytes) -> None:
        """Now, or after what waits. Raises ConnectionError where the peer has gone."""
        data = len(message).to_bytes(_LENGTH_BYTES, "little") + message
        self._waiting.append(memoryview(data))
        if len(self._waiting) == 1:
            self.flush()

    def flush(self) -> None:
        """Of what waits, as much as the peer has room for. Raises ConnectionError where it has
        gone."""
        waiting = self._waiting
        while waiting:
            self._join_first()
            try:
                sent = self._socket.send(waiting[0])
            except BlockingIOError:
                return
            if sent < len(waiting[0]):
                waiting[0] = waiting[0][sent:]
            else:
                waiting.popleft()

    def _join_first(self) -> None:
        waiting = self._waiting
        if len(waiting) == 1 or len(waiting[0]) >= SEND_BYTES:
            return
        pieces: list[memoryview] = []
        size = 0
        while waiting and size < SEND_BYTES:
            pieces.append(waiting.popleft())
            size += len(pieces[-1])
        waiting.appendleft(memoryview(b"".join(pieces)))

    def close(self) -> None:
        """Drops what waits; what has gone out can still be read by the peer."""
        self._waiting.clear()
        self._socket.close()
