"""The metrics' port: apart from the users', plain, on loopback, and gone when the server is."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import closing
from urllib.request import urlopen

import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter

from tests.service.harness import running
from tests.service.stub_server import STUB, answers, engines, serving
from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.exporter import Exporter
from zllm.service.serve import serve


def listening() -> set[int]:
    """The ports on which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


async def fetch(url: str) -> str:
    return await asyncio.to_thread(lambda: urlopen(url, timeout=5).read().decode())


async def test_the_page_shows_requests_and_the_process() -> None:
    before = listening()
    async with serving() as served:
        await answers(served.target)
        page = await fetch(served.metrics_url)
        assert 'zllm:request_success_total{finished_reason="length",model_name="stub"} 1.0' in page
        assert "process_resident_memory_bytes" in page
    assert listening() == before


async def test_without_metrics_no_port_is_opened() -> None:
    async with serving(metrics=False) as served:
        await answers(served.target)
        assert not any(line.startswith("metrics on ") for line in served.lines)


@pytest.mark.parametrize("taken", ["port", "admin_port", "metrics_port"])
async def test_a_taken_port_is_named_and_what_had_started_is_stopped(taken: str) -> None:
    before, model = listening(), EngineConfig(model=EMBEDDED_MODEL, served_model_name="stub")
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = {"port": 0, "admin_port": 0, "metrics_port": 0} | {taken: other.getsockname()[1]}
        command = (sys.executable, str(STUB))
        with pytest.raises(ConfigError, match=f"--{taken.replace('_', '-')}"):
            await serve(
                ServerConfig(**ports), [model], model, version="test", say=print, command=command
            )
    assert listening() == before
    assert not engines()


async def test_a_stalled_connection_holds_up_neither_others_nor_the_end() -> None:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc()
    exporter = Exporter(ServerConfig(metrics_port=0), registry)
    await exporter.start()
    port = int(exporter.url.split(":")[2].split("/")[0])
    with closing(socket.create_connection(("127.0.0.1", port))) as stalled:
        stalled.send(b"GET /met")
        assert "things_total 1.0" in await fetch(exporter.url)
        async with asyncio.timeout(5):
            await exporter.stop()
    assert port not in listening()


async def test_an_exporter_that_never_started_stops_too() -> None:
    exporter = Exporter(ServerConfig(), CollectorRegistry())
    async with asyncio.timeout(5):
        await exporter.stop()


def test_beyond_loopback_metrics_are_only_told_on_purpose() -> None:
    with pytest.raises(ConfigError, match="metrics_host"):
        ServerConfig(metrics_host="0.0.0.0")
    assert ServerConfig(metrics_host="0.0.0.0", insecure=True).metrics
    assert not ServerConfig(metrics_host="0.0.0.0", metrics=False).metrics


async def test_the_tests_own_servers_end_also_where_they_could_not_start() -> None:
    before = listening()
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError):
            async with running(config=ServerConfig(port=0, admin_port=taken)):
                pass
        with pytest.raises(ConfigError):
            async with serving(metrics_port=taken):
                pass
    assert listening() == before
    assert not engines()
