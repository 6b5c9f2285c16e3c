"""Starts an engine's process, waits for it, and notices its death.

The engine listens on a unix socket in a directory of mode 0700. Once both ends have met, the
socket's name is removed: nobody else can connect, and nothing is left behind by a kill -9. Several
frontends need the name for as long as one of them may be replaced.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import EngineReady
from zllm.service.engine_client import EngineClient

ENGINE_COMMAND = (sys.executable, "-m", "zllm.runtime.engine_process")
MAX_SOCKET_PATH = 103
"""Bytes, where systems take the fewest: unix(7) has 107 on Linux."""
STOP_S = 5.0
"""How long the engine gets to end after Shutdown."""


class EngineProcess:
    """One model's engine and the client to it. With `keep_socket`, other processes may become
    clients for as long as it runs."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        timeout: float,
        keep_socket: bool = False,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._command = command
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="zllm-"))
        except OSError as error:
            raise ConfigError(
                f"no folder for the engine's socket can be made in {tempfile.gettempdir()}: "
                f"{error.strerror}; make room there, or name another one in TMPDIR"
            ) from None
        address = str(self._directory / "engine.sock")
        if len(os.fsencode(address)) > MAX_SOCKET_PATH:
            self._directory.rmdir()
            raise ConfigError(
                f"{address} is too long for a socket's name ({MAX_SOCKET_PATH} bytes): name a "
                "shorter folder in TMPDIR"
            )
        self._address = address
        self._timeout = timeout
        self._keep_socket = keep_socket
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self.client = EngineClient(address, timeout=timeout)

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ConfigError("the engine's process was not started")
        return self._process.pid

    async def start(self, load_timeout: float | None = None) -> EngineReady:
        """Returns when the model is loaded. Raises ConfigError with what the engine said, where its
        process cannot be started, and after `load_timeout` seconds."""
        try:
            self._process = process = await self._spawn()
            report = await self._first_word(process, load_timeout)
        except BaseException:
            await self.stop()
            raise
        if not self._keep_socket:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._watch = asyncio.create_task(self._await_death())
        return report

    async def _spawn(self) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                self._address,
                stdin=asyncio.subprocess.PIPE,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            raise ConfigError(
                f"the engine's process cannot be started: {error.strerror}; see whether memory, "
                "processes or file descriptors are used up"
            ) from None
        if process.stdin is None:
            raise ConfigError("the engine's process was started without a stdin")
        # It stays open: its end tells the engine to end.
        process.stdin.write(msgspec.json.encode(self._config, enc_hook=str) + b"\n")
        return process

    async def _first_word(
        self, process: asyncio.subprocess.Process, load_timeout: float | None
    ) -> EngineReady:
        ready = asyncio.create_task(self.client.connect())
        died = asyncio.create_task(process.wait())
        try:
            first, _ = await asyncio.wait(
                {ready, died}, timeout=load_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not first:
                raise ConfigError(
                    f"{self._config.model} has not loaded within {load_timeout:g} s: raise "
                    "--load-timeout, or see in the engine's output above where it hangs"
                )
            # A last word may still be on its way.
            await asyncio.wait({ready}, timeout=0.5)
            if ready.done():
                return ready.result()
            raise ConfigError(
                f"the engine's process ended with {exit_words(died.result())} while loading; "
                "its own output above says why"
            )
        finally:
            for task in (ready, died):
                task.cancel()
            await asyncio.wait({ready, died})

    async def wait(self) -> str:
        """Until the engine's process is gone; returns how it went."""
        if self._process is None:
            raise ConfigError("the engine's process was not started")
        code = await self._process.wait()
        return f"the engine's process ended with {exit_words(code)}"

    async def until_lost(self) -> str:
        """Until the engine is dead, or silent for twice its timeout; returns how it went."""
        died = asyncio.create_task(self.wait())
        try:
            while True:
                asleep = asyncio.get_running_loop().time()
                done, _ = await asyncio.wait({died}, timeout=self._timeout / 4)
                if done:
                    return died.result()
                # A late wake-up was this process's own: what the engine said is still unread.
                slept = asyncio.get_running_loop().time() - asleep
                if slept < self._timeout / 2 and self.client.silence > 2 * self._timeout:
                    return f"the engine has not answered for {self.client.silence:.0f} s"
        finally:
            died.cancel()
            await asyncio.wait({died})

    def kill(self) -> None:
        """At once, whatever state it is in."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Ends the engine, by force if it must."""
        if self._watch is not None:
            self._watch.cancel()
        process = self._process
        if process is not None and process.returncode is None:
            if self._watch is None:  # still loading: it would not hear a Shutdown
                process.kill()
            self.client.shut_down()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        await self.client.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _await_death(self) -> None:
        self.client.bury(await self.wait())


def exit_words(code: int) -> str:
    """How a process ended, by asyncio's returncode."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
