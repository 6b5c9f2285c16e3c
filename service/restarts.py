"""Keeps a model's engine running: a dead or hung one is replaced, later and later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import EngineReady
from zllm.service.config import ServerConfig
from zllm.service.engine_client import EngineClient
from zllm.service.supervisor import ENGINE_COMMAND, EngineProcess

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 60.0
OTHER_LOAD_S = 30.0
"""How long a restart waits for another model's load, which should find as free what it may take."""
STEADY_S = 60.0
"""An engine that served for so long has recovered: its failures are counted anew."""

Add = Callable[[EngineReady, EngineClient], Awaitable[None]]


def pause_after(failures: int, backoff: float) -> float:
    """Seconds to wait after so many failures in a row: `backoff`, doubled with each."""
    # As a float, a power of so many as there may be would overflow.
    return min(backoff * 2.0 ** min(failures - 1, 30), MAX_BACKOFF_S)


@asynccontextmanager
async def _turn(lock: asyncio.Lock, patience: float | None) -> AsyncIterator[None]:
    """With the lock, or without it once `patience` seconds have passed."""
    held = True
    try:
        async with asyncio.timeout(patience):
            await lock.acquire()
    except TimeoutError:
        held = False
    try:
        yield
    finally:
        if held:
            lock.release()


class KeptEngine:
    """`add` hears of each engine that takes the first one's place. Those that share the lock
    `loading` load one after another."""

    def __init__(
        self,
        server: ServerConfig,
        config: EngineConfig,
        add: Add,
        *,
        loading: asyncio.Lock,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._server = server
        self._config = config
        self._add = add
        self._loading = loading
        self._command = command
        self._process: EngineProcess | None = None
        self.ready: EngineReady | None = None
        """What the last one said that loaded."""

    @property
    def healthy(self) -> bool:
        return self._process is not None and self._process.client.healthy

    async def start(self, patience: float | None = None) -> tuple[EngineReady, EngineClient]:
        """Returns when the engine has loaded. Raises ConfigError with what it said. Waits no longer
        than `patience` seconds for other models' loads, where it is given."""
        async with _turn(self._loading, patience):
            self._process = process = EngineProcess(
                self._config,
                timeout=self._server.engine_timeout,
                keep_socket=self._server.frontends > 1,
                command=self._command,
            )
            self.ready = ready = await process.start(self._server.load_timeout)
        return ready, process.client

    async def keep(self) -> str:
        """Restarts the engine whenever it is lost; returns how it went the last time, after more
        than `max_restarts` failures in a row."""
        failures = 0
        loop = asyncio.get_running_loop()
        began = loop.time()
        why = await self._until_lost()
        while True:
            failures = 1 if loop.time() - began > STEADY_S else failures + 1
            if failures > self._server.max_restarts:
                return why
            pause = pause_after(failures, self._server.restart_backoff)
            log.error("%s; restart %d in %.1f s", why, failures, pause)
            await asyncio.sleep(pause)
            try:
                # A load that hangs is not to keep a model away that served.
                await self._add(*await self.start(OTHER_LOAD_S))
                began = loop.time()
                why = await self._until_lost()
            except ConfigError as error:
                began = loop.time()
                why = str(error)

    async def stop(self) -> None:
        """Ends the engine, by force if it must."""
        if self._process is not None:
            await self._process.stop()

    async def _until_lost(self) -> str:
        """Returns how the engine was lost, when nothing of it is left."""
        process = self._process
        if process is None:
            raise ConfigError("the engine was not started")
        why = await process.until_lost()
        process.kill()
        process.client.bury(why)
        await process.stop()
        return why
