"""Several frontends on one port: the supervisor's side, which takes a single Server's place.

Each frontend is a process with a Server of its own (service/frontend_process.py), and the kernel
shares new connections out among them (SO_REUSEPORT). One that dies loses its own streams alone,
and is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from zllm.errors import ConfigError, Unavailable
from zllm.runtime.messages import EngineReady
from zllm.service.config import ServerConfig
from zllm.service.control import (
    Abort,
    Add,
    Answer,
    Begin,
    Drain,
    Expect,
    Hurry,
    Listen,
    Lose,
    Order,
    Remove,
)
from zllm.service.engine_client import EngineClient
from zllm.service.engine_metrics import EngineMetrics
from zllm.service.frontend_handle import FrontendHandle
from zllm.service.gpu_metrics import GpuMetrics
from zllm.service.listener import hold_port
from zllm.service.process_metrics import ProcessMetrics
from zllm.service.restarts import STEADY_S, pause_after
from zllm.service.served_model import RunningModel

log = logging.getLogger(__name__)


class Frontends:
    """Is to engines and operators what a Server is, for `config.frontends` of them."""

    def __init__(self, config: ServerConfig, *, version: str, names: Sequence[str] = ()) -> None:
        """`names`: of the models that are loaded at the start, the default first."""
        self._config = config
        self._version = version
        self._names = dict.fromkeys(names)
        self._awaits = set(names)
        self._folders: dict[str, Path] = {}
        self._models: dict[str, RunningModel] = {}
        self._alive: list[FrontendHandle] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._started = 0
        self._all_listen = asyncio.Event()
        self._held: socket.socket | None = None
        self._draining = False
        # Counted by all, read by one: a frontend's counts outlive it.
        self._counts = _folder_in_memory()
        self.registry = CollectorRegistry()
        MultiProcessCollector(self.registry, path=self._counts)  # type: ignore[no-untyped-call]
        self.registry.register(EngineMetrics(lambda: self.models))
        self.registry.register(GpuMetrics(lambda: self.models))
        self.registry.register(ProcessMetrics(lambda: [each.pid for each in self._alive]))

    @property
    def models(self) -> Sequence[RunningModel]:
        """Those whose engine has been ready, in the order of their loading."""
        return list(self._models.values())

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def port(self) -> int:
        return self._config.port

    async def start(self) -> None:
        """All listen. Raises ConfigError where the port is taken or a frontend cannot begin."""
        # Held until the end, so that no restart finds the port taken.
        self._held = hold_port(self._config.host, self._config.port)
        self._config = replace(self._config, port=self._held.getsockname()[1])
        starts = (self._start_one() for _ in range(self._config.frontends))
        for frontend in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(frontend, BaseException):
                raise frontend
            self._keeping.append(asyncio.create_task(self._keep(frontend)))
        self._all_listen.set()

    async def expect(self, name: str, folder: Path) -> None:
        """As Server.expect, in each, once all have started."""
        await self._all_listen.wait()
        self._names.setdefault(name)
        self._folders[name] = folder
        await self._call_all(Expect(name, folder))

    async def add(self, name: str, ready: EngineReady, engine: EngineClient) -> None:
        """As Server.add, in each. An engine that is lost by now or meanwhile is no error: its
        keeper hears of that too. Nor is one that is expected no more."""
        if name not in self._folders:
            return
        last = self._models.get(name)
        restarts = last.restarts + 1 if last is not None else 0
        self._models[name] = RunningModel(
            name=name,
            card=ready.card,
            engine=engine,
            max_context_tokens=ready.max_model_len,
            restarts=restarts,
        )
        self._awaits.discard(name)
        engine.on_health = lambda healthy: self._note_health(name, engine, healthy)
        if not engine.healthy:
            # Nobody could reach it; if it speaks again, they hear of it then.
            self._note_health(name, engine, False)
            return
        try:
            await self._call_all(Add(name, engine.address))
        except ConfigError as error:
            log.error("a frontend cannot reach the engine of %s: %s", name, error)

    async def remove(self, name: str, grace: float = 0.0) -> None:
        """As Server.remove, in each."""
        self._names.pop(name, None)
        self._folders.pop(name, None)
        self._awaits.discard(name)
        model = self._models.pop(name, None)
        if model is not None:
            model.engine.on_health = None
        await self._call_all(Remove(name, grace))

    async def abort(self, request_ids: Iterable[str] | None) -> list[str]:
        """As Server.abort, in all."""
        ids = None if request_ids is None else list(request_ids)
        answers = await self._call_all(Abort(ids))
        return [request_id for answer in answers for request_id in answer.ids]

    async def drain(self, grace: float, hurry: asyncio.Event | None = None) -> int:
        """As Server.drain, in all at once. From now on a dead frontend is not replaced."""
        self._draining = True
        hurrying = asyncio.create_task(self._pass_on(hurry or asyncio.Event()))
        try:
            answers = await self._call_all(Drain(grace))
        finally:
            hurrying.cancel()
            with suppress(asyncio.CancelledError):
                await hurrying
        return sum(answer.count for answer in answers)

    async def stop(self, grace: float, hurry: asyncio.Event | None = None) -> None:
        """Drains, and ends all frontends, by force if it must."""
        await self.drain(grace, hurry)
        for task in self._keeping:
            task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)
        await asyncio.gather(*(frontend.stop() for frontend in self._alive))
        if self._held is not None:
            self._held.close()
        shutil.rmtree(self._counts, ignore_errors=True)

    async def _start_one(self) -> FrontendHandle:
        """One that serves all that is served, and then listens. Raises ConfigError."""
        self._started += 1
        frontend = FrontendHandle()
        names, awaits = list(self._names), sorted(self._awaits)
        try:
            begin = Begin(self._config, self._version, self._started, names, awaits)
            await frontend.start(begin, self._counts)
            # From here on it hears of every change, after what was before it.
            self._alive.append(frontend)
            gone = [Remove(name, 0.0) for name in names if name not in self._names]
            try:
                await _answers([frontend.call(order) for order in (*gone, *self._so_far())])
            except ConfigError as error:
                log.error("a new frontend does not serve all models: %s", error)
            if self._draining:
                raise Unavailable("the server is draining")
            await frontend.call(Listen())
        except BaseException:
            if frontend in self._alive:
                self._alive.remove(frontend)
            await frontend.stop()
            raise
        return frontend

    def _so_far(self) -> list[Order]:
        """What makes a new frontend know what the others know."""
        known: list[Order] = [Expect(name, folder) for name, folder in self._folders.items()]
        healthy = [model for model in self._models.values() if model.engine.healthy]
        return known + [Add(model.name, model.engine.address) for model in healthy]

    async def _keep(self, frontend: FrontendHandle) -> None:
        """Replaces the frontend whenever it is lost, later after each failure in a row."""
        loop = asyncio.get_running_loop()
        failures, began = 0, loop.time()
        while True:
            how = await frontend.until_lost(2 * self._config.engine_timeout)
            if frontend in self._alive:
                self._alive.remove(frontend)
            if not self._draining:
                failures = 1 if loop.time() - began > STEADY_S else failures + 1
                pause = pause_after(failures, self._config.restart_backoff)
                log.error("a frontend is lost: %s; the next one starts in %.1f s", how, pause)
                await asyncio.sleep(pause)
            if self._draining:
                return
            began = loop.time()
            try:
                frontend = await self._start_one()
            except (ConfigError, Unavailable) as error:
                log.error("the next frontend could not start: %s", error)

    async def _call_all(self, order: Order) -> list[Answer]:
        return await _answers([frontend.call(order) for frontend in self._alive])

    def _note_health(self, name: str, engine: EngineClient, healthy: bool) -> None:
        # Those that lost it hear of it again by themselves, unless they never reached it.
        why = engine.lost or "the engine is lost"
        order = Add(name, engine.address) if healthy else Lose(name, why)
        for frontend in self._alive:
            frontend.tell(order)

    async def _pass_on(self, hurry: asyncio.Event) -> None:
        await hurry.wait()
        for frontend in self._alive:
            frontend.tell(Hurry())


async def _answers(calls: Iterable[Awaitable[Answer]]) -> list[Answer]:
    """Those of frontends that live to give one. Raises the first error, once all have answered."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, Unavailable):
            raise answer
    return [answer for answer in answers if isinstance(answer, Answer)]


def _folder_in_memory() -> str:
    """For files that are written through mmap: where a disk is full, that is a SIGBUS."""
    try:
        return tempfile.mkdtemp(prefix="zllm-metrics-", dir="/dev/shm")
    except OSError:  # there is none, or no room in it
        return tempfile.mkdtemp(prefix="zllm-metrics-")
