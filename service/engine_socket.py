"""The service's end of the socket to an engine, read by the event loop itself: no thread, and no
task or future a message."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

from zllm.runtime.frames import Frames

RETRY_S = 0.02
"""Between two looks whether the engine listens."""
_PASSING = {
    errno.ENOENT,  # not bound yet
    errno.ECONNREFUSED,  # not listening yet
    errno.EAGAIN,  # too many at once
    errno.EMFILE,  # others of this process, or of all, have the descriptors and the memory
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
}


class EngineSocket:
    """What is sent waits in line, without bound, until the engine takes it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._frames: Frames | None = None
        self._unsent: list[bytes] = []
        """What was sent before the engine listened."""
        self._closed = False
        self._retry: asyncio.TimerHandle | None = None
        self._writing = False

    def open(self, on_messages: Callable[[list[bytes]], None]) -> None:
        """Connects as soon as the engine listens. From then on the running loop gives `on_messages`
        all that has come, in order; it is never called from within send()."""
        self._loop = asyncio.get_running_loop()
        self._on_messages = on_messages
        self._connect()

    def send(self, message: bytes) -> None:
        """At once, or in order as soon as the engine takes it. Dropped once closed, or where the
        engine has gone: that is told by its process, or its silence."""
        if self._closed:
            return
        if self._frames is None:
            self._unsent.append(message)
            return
        try:
            self._frames.write(message)
        except ConnectionError:
            self.close()
        else:
            self._await_room(self._frames)

    def close(self) -> None:
        """Drops what was not sent yet."""
        self._closed = True
        self._unsent.clear()
        if self._retry is not None:
            self._retry.cancel()
        frames, self._frames = self._frames, None
        if frames is not None:
            self._loop.remove_reader(frames.fileno())
            self._loop.remove_writer(frames.fileno())
            frames.close()

    def _connect(self) -> None:
        try:
            connecting = _connected(self._path)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            self._retry = self._loop.call_later(RETRY_S, self._connect)
            return
        self._frames = Frames(connecting)
        self._loop.add_reader(connecting.fileno(), self._read, self._frames)
        unsent, self._unsent = self._unsent, []
        for message in unsent:
            self.send(message)

    def _read(self, frames: Frames) -> None:
        try:
            messages = frames.read()
        except ConnectionError:
            self.close()
            return
        if messages:
            self._on_messages(messages)

    def _await_room(self, frames: Frames) -> None:
        if frames.waiting and not self._writing:
            self._writing = True
            self._loop.add_writer(frames.fileno(), self._flush, frames)

    def _flush(self, frames: Frames) -> None:
        try:
            frames.flush()
        except ConnectionError:
            self.close()
            return
        if not frames.waiting:
            self._writing = False
            self._loop.remove_writer(frames.fileno())


def _connected(path: str) -> socket.socket:
    """Raises OSError, and leaves nothing then."""
    connecting = socket.socket(socket.AF_UNIX)
    try:
        connecting.setblocking(False)
        connecting.connect(path)
    except BaseException:
        connecting.close()
        raise
    return connecting
