"""`serve` in the test's own process, with stub engines in processes of theirs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import urlopen

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from zllm.clients.aio import AsyncClient
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.memory_shares import share_out
from zllm.service.serve import serve

STUB = Path(__file__).parent / "stub_engine.py"


def engines() -> list[psutil.Process]:
    """Those that this process started and that live, the first started first."""
    return _children("engine.sock")


def frontends() -> list[psutil.Process]:
    """Likewise."""
    return _children("zllm.service.frontend_process")


def _children(word: str) -> list[psutil.Process]:
    found = [process for process in psutil.Process().children() if word in _command(process)]
    return sorted(found, key=lambda process: process.create_time())


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has just ended
        return ""


@dataclass
class Served:
    task: asyncio.Task[int]
    lines: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        return next(line.split()[-1] for line in self.lines if line.startswith("listening on "))

    @property
    def admin_target(self) -> str:
        return next(line.split()[-1] for line in self.lines if line.startswith("admin on "))

    @property
    def metrics_url(self) -> str:
        return next(line.split()[-1] for line in self.lines if line.startswith("metrics on "))

    async def scrape(self, *labels: str) -> dict[tuple[str, ...], float]:
        """The values of series that have these labels and the model's name at most, by name, model
        and labels."""
        page = await asyncio.to_thread(lambda: urlopen(self.metrics_url, timeout=5).read())
        return {
            (sample.name, *(sample.labels.get(label, "") for label in ("model_name", *labels))): (
                sample.value
            )
            for family in text_string_to_metric_families(page.decode())
            for sample in family.samples
            if not sample.labels.keys() - {"model_name", *labels}
        }

    def engines(self) -> list[psutil.Process]:
        return engines()

    def engine(self) -> psutil.Process:
        (engine,) = engines()
        return engine

    async def until_health(self, serving: bool, seconds: float = 10.0, service: str = "") -> None:
        status = health_pb2.HealthCheckResponse
        wanted = status.SERVING if serving else status.NOT_SERVING
        async with grpc.aio.insecure_channel(self.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            async with asyncio.timeout(seconds):
                request = health_pb2.HealthCheckRequest(service=service)
                while (await stub.Check(request)).status != wanted:
                    await asyncio.sleep(0.02)


@asynccontextmanager
async def serving(
    command: tuple[str, ...] = (sys.executable, str(STUB)),
    names: Sequence[str] = ("stub",),
    num_kv_blocks: int | None = 64,
    **settings: float,
) -> AsyncIterator[Served]:
    ports = {"port": 0, "admin_port": 0, "metrics_port": 0}
    config = ServerConfig(**ports | {"restart_backoff": 0.2} | settings)
    template = EngineConfig(model=EMBEDDED_MODEL, num_kv_blocks=num_kv_blocks)
    models = share_out([replace(template, served_model_name=name) for name in names])
    lines: list[str] = []
    task = asyncio.create_task(
        serve(config, models, template, version="test", say=lines.append, command=command)
    )
    served = Served(task, lines)
    try:
        async with asyncio.timeout(20):
            while not any(line.startswith("listening on ") for line in lines):
                assert not task.done(), task.result()
                await asyncio.sleep(0.02)
        yield served
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            assert await task == 0
        assert not engines()


async def answers(target: str, model: str = "") -> None:
    async with AsyncClient(target, attempts=1) as client:
        answer = await client.generate("abc", model=model, max_tokens=3, timeout=10)
        assert answer.text == "abc"
