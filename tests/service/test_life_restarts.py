"""A dead or hung engine is replaced behind the same port, until it fails too often in a row."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from zllm.clients.aio import AsyncClient
from zllm.errors import Unavailable
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.serve import ENGINE_LOST, serve
from zllm.v1 import generation_pb2, generation_pb2_grpc

STUB = Path(__file__).parent / "stub_engine.py"
ONCE = """
import os, runpy, sys
try:
    os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    sys.exit(7)
runpy.run_path({stub!r}, run_name="__main__")
"""


def engines() -> list[psutil.Process]:
    """Those that this process started and that live."""
    children = psutil.Process().children()
    return [child for child in children if "engine.sock" in " ".join(child.cmdline())]


@dataclass
class Served:
    task: asyncio.Task[int]
    lines: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        return next(line.split()[-1] for line in self.lines if line.startswith("listening on "))

    def engine(self) -> psutil.Process:
        (engine,) = engines()
        return engine

    async def until_health(self, serving: bool, seconds: float = 10.0) -> None:
        status = health_pb2.HealthCheckResponse
        wanted = status.SERVING if serving else status.NOT_SERVING
        async with grpc.aio.insecure_channel(self.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            async with asyncio.timeout(seconds):
                while (await stub.Check(health_pb2.HealthCheckRequest())).status != wanted:
                    await asyncio.sleep(0.02)


@asynccontextmanager
async def serving(
    command: tuple[str, ...] = (sys.executable, str(STUB)), **settings: float
) -> AsyncIterator[Served]:
    config = ServerConfig(port=0, admin_port=0, **{"restart_backoff": 0.2} | settings)
    engine = EngineConfig(model=EMBEDDED_MODEL, served_model_name="stub")
    lines: list[str] = []
    task = asyncio.create_task(
        serve(config, engine, version="test", say=lines.append, command=command)
    )
    served = Served(task, lines)
    async with asyncio.timeout(20):
        while not any(line.startswith("listening on ") for line in lines):
            assert not task.done(), task.result()
            await asyncio.sleep(0.02)
    try:
        yield served
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            assert await task == 0
        assert not engines()


async def answers(target: str) -> None:
    async with AsyncClient(target, attempts=1) as client:
        assert (await client.generate("abc", max_tokens=3, timeout=10)).text == "abc"


async def test_a_killed_engine_is_replaced_behind_the_same_port() -> None:
    async with serving() as served:
        await answers(served.target)
        async with AsyncClient(served.target, attempts=1) as client:
            stream = client.stream("abc", ignore_eos=True, max_tokens=250)
            deltas = aiter(stream)
            await anext(deltas)
            before = served.engine().pid
            served.engine().kill()
            with pytest.raises(Unavailable, match="signal 9"):
                async for _ in deltas:
                    pass
        await served.until_health(False)
        await served.until_health(True)
        assert served.engine().pid != before
        await answers(served.target)


async def test_a_stopped_engine_turns_not_serving_within_5_s_and_is_replaced() -> None:
    async with serving() as served, AsyncClient(served.target, attempts=1) as client:
        await answers(served.target)
        hung = served.engine()
        began = time.monotonic()
        hung.suspend()
        asked = asyncio.create_task(client.generate("abc", timeout=20))
        await served.until_health(False, seconds=5)
        assert time.monotonic() - began < 5
        with pytest.raises(Unavailable, match="not answered"):
            await asked
        await served.until_health(True, seconds=20)
        assert not hung.is_running()
        await answers(served.target)


async def test_requests_of_the_restart_are_told_when_to_retry() -> None:
    async with serving(restart_backoff=1.0) as served:
        served.engine().kill()
        await served.until_health(False)
        async with grpc.aio.insecure_channel(served.target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(generation_pb2.GenerateRequest(text="abc"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        trailers = dict(caught.value.trailing_metadata())
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.seconds >= 1


async def test_an_engine_that_never_comes_back_ends_the_server_with_its_own_code(
    tmp_path: Path,
) -> None:
    once = ONCE.format(mark=str(tmp_path / "mark"), stub=str(STUB))
    command = (sys.executable, "-c", once)
    async with serving(command, max_restarts=2, restart_backoff=0.05) as served:
        await answers(served.target)
        served.engine().kill()
        async with asyncio.timeout(20):
            assert await served.task == ENGINE_LOST == 3


async def test_sigterm_in_the_midst_of_a_restart_ends_it() -> None:
    async with serving(restart_backoff=30.0) as served:
        served.engine().kill()
        await served.until_health(False)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await served.task == 0
