"""What files say, read anew when one of them has changed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from zllm.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

Content = TypeVar("Content")
_Stamp = tuple[tuple[int, int, int], ...]


class Reloading(Generic[Content]):
    """Looks at most once a second, and only when asked. A new version that does not load is
    logged, and the last good one stays. Any thread may ask: gRPC's handshakes do."""

    def __init__(self, load: Callable[[], Content], paths: Sequence[str]) -> None:
        self._load = load
        self._paths = paths
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._looked = time.monotonic()
        self._content = load()

    def get(self) -> Content:
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                self._reload()
            return self._content

    def _reload(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        # Also where loading fails: of two files that change one after the other, the second's
        # change is another stamp.
        self._stamp = stamp
        try:
            self._content = self._load()
        except ConfigError as error:
            log.error("kept the old content: %s", error)
        else:
            log.info("read %s anew", ", ".join(self._paths))

    def _look(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: str) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
