"""The supervisor's end of one frontend process: it starts it, calls it, and sees it end."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable
from contextlib import suppress

from zllm.errors import ConfigError, Unavailable
from zllm.service.control import COUNTS, Answer, Begin, Call, Channel, End, Order, Ping
from zllm.service.supervisor import exit_words

FRONTEND_COMMAND = (sys.executable, "-m", "zllm.service.frontend_process")
PING_EVERY_S = 1.0
STOP_S = 5.0
"""How long it gets to end once its channel is closed."""


class FrontendHandle:
    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._reading: asyncio.Task[None] | None = None
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._next_call = 1

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ConfigError("the frontend's process was not started")
        return self._process.pid

    async def start(self, begin: Begin, counts: str) -> None:
        """`counts` is the folder of prometheus_client's files. Raises ConfigError where it cannot
        begin."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *FRONTEND_COMMAND,
                    stdin=theirs.fileno(),
                    env=os.environ | {COUNTS: counts},
                )
        except OSError as error:
            raise ConfigError(f"the frontend's process cannot be started: {error}") from error
        self._channel = await Channel.over(ours)
        self._reading = asyncio.create_task(self._read(self._channel))
        await self.call(begin)

    def call(self, order: Order) -> Awaitable[Answer]:
        """Sends it now, in the order of the calls. Waiting for its answer raises ConfigError with
        what it says, and Unavailable where the frontend ends before."""
        number = self._next_call
        self._next_call += 1
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        if self._reading is None or self._reading.done():
            answer.set_exception(Unavailable("the frontend has ended"))
        else:
            self._send(Call(number, order))
        return self._given(number, answer)

    async def _given(self, number: int, answer: asyncio.Future[Answer]) -> Answer:
        try:
            given = await answer
        finally:
            self._calls.pop(number, None)
        if given.error:
            raise ConfigError(given.error)
        return given

    def tell(self, order: Order) -> None:
        """Without waiting for an answer."""
        self._send(Call(0, order))

    async def until_lost(self, timeout: float) -> str:
        """Until its process is gone, or is killed for not answering within so many seconds;
        returns how it went."""
        if self._process is None:
            return "it never began"
        ended = asyncio.create_task(self._process.wait())
        try:
            while not ended.done():
                if not await self._answers(timeout):
                    self._process.kill()
                    await ended
                    return f"it did not answer for {timeout:g} s"
                await asyncio.wait({ended}, timeout=PING_EVERY_S)
            return f"it ended with {exit_words(ended.result())}"
        finally:
            ended.cancel()

    async def _answers(self, timeout: float) -> bool:
        """Whether it answers in time, or has ended. Asked twice: where this process itself stood
        still, the first answer may be late."""
        for _ in range(2):
            try:
                async with asyncio.timeout(timeout / 2):
                    await self.call(Ping())
            except TimeoutError:
                continue
            except Unavailable:
                pass
            return True
        return False

    async def stop(self) -> None:
        """Ends it, by force if it must."""
        if self._channel is not None:
            self.tell(End())
            self._channel.close()
        if self._process is not None and self._process.returncode is None:
            # No asyncio.timeout: before Python 3.11.3 a task that has been cancelled, as one is
            # whose start is given up, gets no TimeoutError (gh-102780).
            ended = asyncio.create_task(self._process.wait())
            await asyncio.wait({ended}, timeout=STOP_S)
            if not ended.done():
                self._process.kill()
            await ended
        if self._reading is not None:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading

    def _send(self, call: Call) -> None:
        if self._channel is not None:
            self._channel.send(call)

    async def _read(self, channel: Channel) -> None:
        try:
            while (answer := await channel.receive(Answer)) is not None:
                waiting = self._calls.get(answer.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        finally:
            for waiting in self._calls.values():
                if not waiting.done():
                    waiting.set_exception(Unavailable("the frontend has ended"))
