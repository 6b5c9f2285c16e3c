"""`zllm serve`: start the engines, listen, say where, and leave in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.service.admin import AdminService
from zllm.service.admin_server import AdminServer
from zllm.service.calls import Observer
from zllm.service.config import ServerConfig
from zllm.service.engines import Engines
from zllm.service.exporter import Exporter
from zllm.service.listener import join_address
from zllm.service.logs import Logs
from zllm.service.request_log import RequestLog
from zllm.service.server import Server
from zllm.service.stats_log import StatsLog
from zllm.service.supervisor import ENGINE_COMMAND

if TYPE_CHECKING:
    from zllm.service.tracing import Traces

log = logging.getLogger(__name__)

ENGINE_LOST = 3
"""Exit code where every engine failed more often in a row than max_restarts allows."""


def run(
    server: ServerConfig,
    models: Sequence[EngineConfig],
    template: EngineConfig,
    *,
    version: str,
    command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code; raises ConfigError at start-up."""
    with Logs(server):
        serving = serve(server, models, template, version=version, command=command)
        try:
            import uvloop
        except ImportError:
            return asyncio.run(serving)
        return uvloop.run(serving)


def _say(line: str) -> None:
    """To stdout past its buffer: neither a full disk nor a reader that left ends the server, now or
    when a buffer would be flushed at its exit."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def spare_garbage_collection() -> None:
    """What was loaded stays: it is never looked through again, and young objects more rarely. With
    CPython's own thresholds the collector shows in a busy service's profile (decision 038)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


async def serve(
    config: ServerConfig,
    models: Sequence[EngineConfig],
    template: EngineConfig,
    *,
    version: str,
    say: Callable[[str], None] = _say,
    command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """`template` is what engines that are loaded later are told, apart from their model."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    say(f"zllm {version}")
    names = [model.served_model_name for model in models]
    observers: list[Observer] = [RequestLog(config.log_prompts)]
    traces = _traces(config, version)
    if traces is not None:
        observers.append(traces)
    server = Server(config, awaits=names, observers=observers)
    engines = Engines(config, server, say=say, command=command)
    admin = AdminServer(config, AdminService(config, version, server, engines, template))
    exporter = Exporter(config, server.metrics.registry)
    stopping = asyncio.create_task(stop.wait())
    stats = asyncio.create_task(StatsLog(lambda: server.models).run(config.stats_interval))
    try:
        # Whatever fails to start, the rest is stopped.
        if config.metrics:
            await exporter.start()
        await server.start()
        await admin.start()
        starting = asyncio.create_task(engines.start(models))
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return 0
        await starting
        say(f"admin on {join_address(config.admin_host, admin.port)}")
        if config.metrics:
            say(f"metrics on {exporter.url}")
        spare_garbage_collection()
        say(f"listening on {join_address(config.host, server.port)}")
        return await _until_stopped(engines, stopping)
    finally:
        stopping.cancel()
        stats.cancel()
        await server.stop(config.shutdown_grace if engines.healthy else 0.0, hurry)
        await admin.stop()
        await exporter.stop()
        if traces is not None:
            await traces.stop()
        await engines.stop()


def _traces(config: ServerConfig, version: str) -> Traces | None:
    if not config.otlp_endpoint:
        return None
    try:
        from zllm.service.tracing import Traces
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint needs OpenTelemetry ({error}): pip install 'zllm[tracing]'"
        ) from None
    return Traces.to(config.otlp_endpoint, version)


async def _until_stopped(engines: Engines, stopping: asyncio.Task[bool]) -> int:
    lost = asyncio.create_task(engines.until_all_lost())
    await asyncio.wait({stopping, lost}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        # Not after the drain: an engine that dies by then is not replaced.
        lost.cancel()
        engines.keep_no_longer()
        return 0
    log.error("%s; giving up", lost.result())
    return ENGINE_LOST
