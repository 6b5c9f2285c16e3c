"""`zllm serve`: start the engine, listen, say where, and leave in good order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence

from zllm.runtime.chat_template import load_chat_template
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import EngineReady
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.config import ServerConfig
from zllm.service.engine_client import EngineClient
from zllm.service.restarts import KeptEngine
from zllm.service.served_model import ServedModel
from zllm.service.server import Server, join_address
from zllm.service.supervisor import ENGINE_COMMAND

ENGINE_LOST = 3
"""Exit code where the engine failed more often in a row than max_restarts allows."""


def run(server: ServerConfig, engine: EngineConfig, *, version: str) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code; raises ConfigError at start-up."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serve(server, engine, version=version))
    return uvloop.run(serve(server, engine, version=version))


async def serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    *,
    version: str,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    tokenizer = load_tokenizer(engine_config.model)
    chat_template = load_chat_template(engine_config.model)
    name = engine_config.served_model_name or engine_config.model.name
    say(f"zllm {version}: loading {name} from {engine_config.model}")
    server = Server(config, version=version, engines=[engine_config])
    await server.start()

    async def add(ready: EngineReady, engine: EngineClient) -> None:
        for line in ready.startup_report:
            say(line)
        await server.add(
            ServedModel(
                name=name,
                card=ready.card,
                tokenizer=tokenizer,
                chat_template=chat_template,
                engine=engine,
                max_context_tokens=ready.max_model_len,
            )
        )

    engine = KeptEngine(config, engine_config, add, command=command)
    starting = asyncio.create_task(engine.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            return 0
        await starting
        say(f"admin on {join_address(config.admin_host, server.admin_port)}")
        say(f"listening on {join_address(config.host, server.port)}")
        return await _until_stopped(engine, stopping)
    finally:
        stopping.cancel()
        await server.stop(config.shutdown_grace if engine.healthy else 0.0, hurry)
        await engine.stop()


async def _until_stopped(engine: KeptEngine, stopping: asyncio.Task[bool]) -> int:
    kept = asyncio.create_task(engine.keep())
    await asyncio.wait({stopping, kept}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        # Not after the drain: an engine that dies by then is not replaced.
        kept.cancel()
        await asyncio.wait({kept})
        return 0
    print(f"zllm: {kept.result()}; giving up", file=sys.stderr, flush=True)
    return ENGINE_LOST
