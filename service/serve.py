"""`zllm serve`: start the engines, listen, say where, and leave in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence

from zllm.runtime.config import EngineConfig
from zllm.service.admin import AdminService
from zllm.service.admin_server import AdminServer
from zllm.service.at_once import both
from zllm.service.config import ServerConfig
from zllm.service.engines import Engines
from zllm.service.event_loop import run_on_loop, spare_garbage_collection
from zllm.service.exporter import Exporter
from zllm.service.frontends import Frontends
from zllm.service.listener import join_address
from zllm.service.logs import Logs, Words
from zllm.service.model_folders import check_root
from zllm.service.observers import observing
from zllm.service.server import Server
from zllm.service.stats_log import StatsLog
from zllm.service.supervisor import ENGINE_COMMAND

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
    """Serves until SIGTERM, SIGINT or SIGHUP. Returns the exit code; raises ConfigError where it
    cannot start."""
    with Logs(server), Words() as say:
        return run_on_loop(
            serve(server, models, template, version=version, say=say, command=command)
        )


async def serve(
    config: ServerConfig,
    models: Sequence[EngineConfig],
    template: EngineConfig,
    *,
    version: str,
    say: Callable[[str], None],
    command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """`template` is what engines that are loaded later are told, apart from their model."""
    names = [model.served_model_name for model in models]
    say(f"zllm {version}")
    check_root(config.model_root)
    if config.frontends > 1:
        front = Frontends(config, version=version, names=names)
        return await _serve(config, front, models, template, version, say, command)
    # One frontend is in this process: no supervisor, no hop.
    async with observing(config, version) as observers:
        server = Server(config, names=names, awaits=names, observers=observers)
        return await _serve(config, server, models, template, version, say, command)


async def _serve(
    config: ServerConfig,
    server: Server | Frontends,
    models: Sequence[EngineConfig],
    template: EngineConfig,
    version: str,
    say: Callable[[str], None],
    command: Sequence[str],
) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    # A closed terminal's, too, unless whoever started it said to ignore that, as nohup does.
    hangup = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else ()
    for number in (signal.SIGTERM, signal.SIGINT, *hangup):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    engines = Engines(config, server, say=say, command=command)
    admin = AdminServer(config, AdminService(config, version, server, engines, template))
    exporter = Exporter(config, server.registry)
    stopping = asyncio.create_task(stop.wait())
    stats = asyncio.create_task(StatsLog(lambda: server.models).run(config.stats_interval))
    try:
        # Whatever fails to start, the rest is stopped.
        if config.metrics:
            await exporter.start()
        # Frontends take half a second to be there, which the engines' processes need not wait for.
        starting = asyncio.create_task(both(_listen(server, admin), engines.start(models)))
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
        await engines.stop()


async def _listen(server: Server | Frontends, admin: AdminServer) -> None:
    await server.start()
    # Not before: a frontend that was still to come would not hear of a drain.
    await admin.start()


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
