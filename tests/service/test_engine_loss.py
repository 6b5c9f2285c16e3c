"""A dead or hung engine: its requests fail at once, health follows, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.runtime.framed import Listening
from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.errors import ConfigError, Unavailable
from zllm.runtime.config import EngineConfig
from zllm.runtime.detokenizer import Detokenizer
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import AddRequest, Heartbeat, Load, Sampling, Stopping
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.engine_client import EngineClient
from zllm.service.streams import Stream
from zllm.service.supervisor import EngineProcess

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
STUB = (sys.executable, str(Path(__file__).parent / "stub_engine.py"))
CONFIG = EngineConfig(model=EMBEDDED_MODEL)


NO_MESSAGE = b"\xc1"
"""The one byte that msgpack never uses."""


@pytest.fixture
def raw_engine(tmp_path: Path) -> Iterator[Listening]:
    """An engine's end of the socket, for a test to speak through."""
    engine = Listening(str(tmp_path / "engine.sock"))
    yield engine
    engine.close()


async def health(server: Harness, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def until_health(server: Harness, status: int) -> None:
    async with asyncio.timeout(10):
        while await health(server, "zllm.v1.GenerationService") != status:
            await asyncio.sleep(0.02)


async def test_a_hung_engine_fails_its_requests_and_comes_back() -> None:
    engine = StubEngine()
    async with running(engine, timeout=1.0) as server:
        await until_health(server, SERVING)
        engine.frozen.set()
        with pytest.raises(Unavailable):
            await server.client.generate("abc", timeout=20)
        assert await health(server) == NOT_SERVING
        load = await server.load()
        assert load.running_requests == load.queued_requests == load.kv_blocks_free == 0
        with pytest.raises(Unavailable):
            await server.client.generate("abc", timeout=20)
        engine.frozen.clear()
        await until_health(server, SERVING)
        assert (await server.client.generate("abc", max_tokens=2)).text == "ab"
        await server.until_idle()


async def test_what_is_no_message_fails_the_streams_that_it_may_have_spoken_of(
    raw_engine: Listening,
) -> None:
    client = EngineClient(raw_engine.path, timeout=60)
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    raw_engine.framed.send(msgspec.msgpack.encode(StubEngine().ready()))
    await connecting
    stream = Stream(Detokenizer(load_tokenizer(EMBEDDED_MODEL)))
    client.submit(AddRequest(0, b"\0" * 4, Sampling(), Stopping(max_tokens=1)), stream)
    raw_engine.framed.send(NO_MESSAGE)
    with pytest.raises(Unavailable, match="no message"):
        await stream.take()
    assert not client.healthy
    raw_engine.framed.send(msgspec.msgpack.encode(Heartbeat(Load())))
    async with asyncio.timeout(5):
        while not client.healthy:
            await asyncio.sleep(0.01)
    await client.close()


async def test_an_engine_that_begins_with_what_is_no_message_does_not_start(
    raw_engine: Listening,
) -> None:
    client = EngineClient(raw_engine.path, timeout=60)
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    raw_engine.framed.send(NO_MESSAGE)
    with pytest.raises(ConfigError, match="no message"):
        await connecting
    await client.close()


async def test_an_idle_engine_stays_healthy() -> None:
    async with running(timeout=0.8) as server:
        await until_health(server, SERVING)
        await asyncio.sleep(2)
        assert await health(server) == SERVING


async def test_health_knows_each_service_and_no_other() -> None:
    async with running() as server:
        for service in ("", "zllm.v1.GenerationService", "zllm.v1.ModelService"):
            async with asyncio.timeout(5):
                while await health(server, service) != SERVING:
                    await asyncio.sleep(0.01)
        stub = health_pb2_grpc.HealthStub(server.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_a_killed_engine_is_noticed_at_once() -> None:
    engine = EngineProcess(CONFIG, timeout=60, command=STUB)
    await engine.start()
    assert engine.client.healthy
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert "signal 9" in await engine.wait()
        while engine.client.healthy:
            await asyncio.sleep(0.01)
    await engine.stop()


async def test_the_sockets_directory_is_private_and_gone_once_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = EngineProcess(CONFIG, timeout=60, command=STUB)
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    await engine.start()
    assert not list(tmp_path.iterdir())
    await engine.stop()
    assert not list(tmp_path.iterdir())


async def test_an_engine_that_ends_while_loading_is_a_config_error() -> None:
    command = (sys.executable, "-c", "import sys; sys.exit(3)")
    engine = EngineProcess(CONFIG, timeout=60, command=command)
    with pytest.raises(ConfigError, match="exit code 3"):
        await engine.start()


async def test_what_keeps_an_engine_from_starting_is_a_config_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = EngineProcess(CONFIG, timeout=60, command=(str(tmp_path / "nothing"),))
    with pytest.raises(ConfigError, match="cannot be started"):
        await engine.start()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="TMPDIR"):
        EngineProcess(CONFIG, timeout=60, command=STUB)


async def test_an_engine_that_ignores_shutdown_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zllm.service.supervisor.STOP_S", 0.3)
    engine = EngineProcess(CONFIG, timeout=60, command=STUB)
    await engine.start()
    os.kill(engine.pid, signal.SIGSTOP)
    await engine.stop()
    assert "signal 9" in await engine.wait()
