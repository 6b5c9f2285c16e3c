"""One of several frontends: a Server in a process of its own, led by the supervisor.

service/frontends.py starts it as `python -m zllm.service.frontend_process`; stdin is its end of the
control channel, and the channel's end is its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from zllm.errors import ConfigError, Unavailable, ZllmError
from zllm.service.calls import Observer
from zllm.service.control import (
    COUNTS,
    Abort,
    Add,
    Answer,
    Begin,
    Call,
    Channel,
    Drain,
    End,
    Expect,
    Hurry,
    Listen,
    Lose,
    Order,
    Remove,
)
from zllm.service.engine_client import EngineClient
from zllm.service.event_loop import run_on_loop, spare_garbage_collection
from zllm.service.logs import Logs
from zllm.service.observers import observing
from zllm.service.server import Server

log = logging.getLogger(__name__)

CONNECT_S = 120.0
"""More than an engine's longest step, before whose end it greets nobody."""


class Frontend:
    """Carries out the supervisor's orders, those of one model one after another."""

    def __init__(self, begin: Begin, observers: Sequence[Observer]) -> None:
        self._begin = begin
        self._server = Server(
            begin.config, names=begin.names, awaits=begin.awaits, observers=observers
        )
        self._engines: dict[str, EngineClient] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._readings: dict[str, asyncio.Task[None]] = {}
        self._hurry = asyncio.Event()

    async def carry_out(self, number: int, order: Order) -> Answer:
        server = self._server
        if isinstance(order, Listen):
            await server.start()
        elif isinstance(order, Abort):
            return Answer(number, ids=await server.abort(order.request_ids))
        elif isinstance(order, Drain):
            return Answer(number, count=await server.drain(order.grace, self._hurry))
        elif isinstance(order, Hurry):
            self._hurry.set()
        elif isinstance(order, Lose):
            # Not in turn: whoever waits for that engine waits no longer.
            server.await_no_more(order.name)
            if order.name in self._engines:
                self._engines[order.name].lose(order.why)
        elif isinstance(order, (Expect, Add, Remove)):
            if isinstance(order, Remove) and order.name in self._readings:
                # Nobody waits for that any more, and a folder may take as long as load_timeout.
                self._readings[order.name].cancel()
            async with self._turns[order.name]:
                await self._change(order)
        return Answer(number)

    async def _change(self, order: Expect | Add | Remove) -> None:
        if isinstance(order, Expect):
            await self._expect(order.name, order.folder)
        elif isinstance(order, Add):
            await self._add(order.name, order.address)
        else:
            await self._server.remove(order.name, order.grace)
            gone = self._engines.pop(order.name, None)
            if gone is not None:
                await gone.close()

    async def _expect(self, name: str, folder: Path) -> None:
        reading = asyncio.create_task(self._server.expect(name, folder))
        self._readings[name] = reading
        await asyncio.wait({reading})
        del self._readings[name]
        if reading.cancelled():
            raise Unavailable(f"{name} is expected no more")
        reading.result()

    async def _add(self, name: str, address: str) -> None:
        last = self._engines.get(name)
        if last is not None and last.address == address:
            return  # it has been told before
        if not Path(address).parent.is_dir():
            # Lost while this waited for its turn: nobody will ever answer there.
            self._server.await_no_more(name)
            raise ConfigError(f"the engine of {name} is gone")
        engine = self._engines[name] = EngineClient(
            address, timeout=self._begin.config.engine_timeout, number=self._begin.number
        )
        try:
            async with asyncio.timeout(CONNECT_S):
                ready = await engine.connect()
        except (ConfigError, OSError) as error:  # TimeoutError is one
            self._engines.pop(name, None)
            self._server.await_no_more(name)
            await engine.close()
            raise ConfigError(str(error) or f"no answer within {CONNECT_S:g} s") from error
        await self._server.add(name, ready, engine)
        spare_garbage_collection()
        if last is not None:
            await last.close()

    async def stop(self) -> None:
        await self._server.stop(0.0)
        for engine in self._engines.values():
            await engine.close()

    def remove_folders(self) -> None:
        """Of sockets and counts, which all frontends use: where the supervisor has died, nobody
        else does."""
        sockets = [Path(e.address) for e in self._engines.values()]
        for folder in (Path(os.environ[COUNTS]), *(path.parent for path in sockets)):
            shutil.rmtree(folder, ignore_errors=True)


async def serve(control: socket.socket) -> int:
    channel = await Channel.over(control)
    first = await channel.receive(Call)
    if first is None or not isinstance(first.order, Begin):
        return 1
    begin = first.order
    with Logs(begin.config):
        try:
            async with observing(begin.config, begin.version) as observers:
                frontend = Frontend(begin, observers)
                channel.send(Answer(first.number))
                dismissed = await _obey(frontend, channel)
                await frontend.stop()
        except ConfigError as error:
            channel.send(Answer(first.number, error=str(error)))
            await channel.receive(Call)  # gone before it is read, the answer might be too
            return 1
    if not dismissed:
        frontend.remove_folders()
    return 0


async def _obey(frontend: Frontend, channel: Channel) -> bool:
    """Until it is dismissed (True) or the supervisor has died (False)."""
    orders: set[asyncio.Task[None]] = set()
    while (call := await channel.receive(Call)) and not isinstance(call.order, End):
        task = asyncio.create_task(_answer(frontend, channel, call))
        orders.add(task)
        task.add_done_callback(orders.discard)
    for task in orders:
        task.cancel()
    return call is not None


async def _answer(frontend: Frontend, channel: Channel, call: Call) -> None:
    try:
        answer = await frontend.carry_out(call.number, call.order)
    except ZllmError as error:
        answer = Answer(call.number, error=str(error))
    except Exception as error:
        log.exception("unforeseen error in %s", type(call.order).__name__)
        answer = Answer(call.number, error=f"unforeseen: {type(error).__name__}")
    channel.send(answer)


def main() -> int:
    # Ctrl-C reaches the whole terminal group, and a service manager's SIGTERM every process: the
    # supervisor decides when a frontend ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What is counted of a model that has gone stays until the server ends, and is no cause to warn.
    warnings.filterwarnings("ignore", "Removal of labels")
    return run_on_loop(serve(socket.socket(fileno=0)))


if __name__ == "__main__":
    sys.exit(main())
