"""A whole server in the test's process: real gRPC on loopback, real sockets to a stub engine."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc

from tests.service.stub_engine import EngineThread, StubEngine
from zllm.clients.aio import AsyncClient
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.admin import AdminService
from zllm.service.admin_server import AdminServer
from zllm.service.calls import Observer
from zllm.service.config import ServerConfig
from zllm.service.engine_client import EngineClient
from zllm.service.engines import Engines
from zllm.service.server import Server
from zllm.v1 import admin_pb2, admin_pb2_grpc


@dataclass
class Harness:
    engine: StubEngine
    engine_client: EngineClient
    server: Server
    client: AsyncClient
    channel: grpc.aio.Channel
    admin: admin_pb2_grpc.AdminServiceStub
    admin_port: int

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def load(self) -> admin_pb2.Load:
        answer = await self.admin.GetLoad(admin_pb2.GetLoadRequest())
        return answer.loads[0]

    async def until(self, met: Callable[[admin_pb2.Load], bool], what: str) -> admin_pb2.Load:
        """Waits until the load is as `met` says; fails saying `what` never came."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            load = await self.load()
            if met(load):
                return load
            await asyncio.sleep(0.01)
        raise AssertionError(f"{what}: {load}")

    async def until_idle(self) -> None:
        """Every block is back and nothing runs or waits, in the engine and in the service."""
        await self.until(
            lambda load: (
                load.kv_blocks_free == load.kv_blocks_total > 0
                and load.running_requests == load.queued_requests == 0
            ),
            "blocks or requests never came back",
        )
        assert self.engine_client.live_streams == 0


@asynccontextmanager
async def running(
    engine: StubEngine | None = None,
    config: ServerConfig | None = None,
    timeout: float = 10.0,
    observers: Sequence[Observer] = (),
) -> AsyncIterator[Harness]:
    engine = engine or StubEngine()
    config = config or ServerConfig(port=0, admin_port=0)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        thread = EngineThread(engine, f"{folder}/engine.sock")
        client = EngineClient(thread.address, timeout=timeout)
        stack.push_async_callback(_end, thread, client)
        ready = await client.connect()
        server = Server(config, names=["stub"], awaits=["stub"], observers=observers)
        engines = Engines(config, server, say=lambda _: None)
        template = EngineConfig(model=EMBEDDED_MODEL)
        admin_server = AdminServer(config, AdminService(config, "test", server, engines, template))
        # Whatever fails to start, the rest is stopped.
        stack.push_async_callback(admin_server.stop)
        stack.push_async_callback(server.stop, 0.0)
        await server.start()
        await admin_server.start()
        await server.expect("stub", EMBEDDED_MODEL)
        await server.add("stub", ready, client)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        admin_channel = grpc.aio.insecure_channel(f"127.0.0.1:{admin_server.port}")
        stack.push_async_callback(admin_channel.close)
        stack.push_async_callback(channel.close)
        async with AsyncClient(f"127.0.0.1:{server.port}", attempts=1) as aio_client:
            admin = admin_pb2_grpc.AdminServiceStub(admin_channel)
            yield Harness(engine, client, server, aio_client, channel, admin, admin_server.port)


async def _end(thread: EngineThread, client: EngineClient) -> None:
    client.shut_down()
    await asyncio.to_thread(thread.join)
    await client.close()
