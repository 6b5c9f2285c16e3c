"""Either end of an engine's socket, for a test to speak through: whole messages, waited for."""

from __future__ import annotations

import select
import socket
from collections import deque

from zllm.runtime.frames import Frames

PATIENCE_S = 5.0


class Framed:
    def __init__(self, connected: socket.socket) -> None:
        self._frames = Frames(connected)
        self._heard: deque[bytes] = deque()

    @classmethod
    def to(cls, path: str) -> Framed:
        """A service's end."""
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(path)
        return cls(connected)

    def send(self, message: bytes) -> None:
        self._frames.write(message)
        while self._frames.waiting:
            assert select.select([], [self._frames], [], PATIENCE_S)[1], "nobody reads"
            self._frames.flush()

    def recv(self) -> bytes:
        """The next message. Raises ConnectionError where the peer has gone."""
        while not self._heard:
            assert select.select([self._frames], [], [], PATIENCE_S)[0], "nothing came"
            self._heard.extend(self._frames.read())
        return self._heard.popleft()

    def close(self) -> None:
        self._frames.close()


class Listening:
    """An engine's end, which lets in one service when it is first spoken through."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(PATIENCE_S)
        self._listener.bind(path)
        self._listener.listen()
        self._framed: Framed | None = None

    @property
    def framed(self) -> Framed:
        if self._framed is None:
            self._framed = Framed(self._listener.accept()[0])
        return self._framed

    def close(self) -> None:
        self._listener.close()
        if self._framed is not None:
            self._framed.close()
