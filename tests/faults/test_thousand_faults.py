"""A thousand calls that end badly, beside calls that do not: the server keeps nothing of them."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from tests.faults.http2 import Connection
from tests.faults.ledger import assert_given_back, holdings
from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.v1 import generation_pb2, generation_pb2_grpc

FAULTS = 1000
AT_ONCE = 100
LIVE = 20

Fault = Callable[[Harness, random.Random, int], Awaitable[None]]


def endless() -> generation_pb2.GenerateRequest:
    """More tokens than any test waits for."""
    request = generation_pb2.GenerateRequest(text="a prompt of some blocks" * 3)
    request.stopping.ignore_eos = True
    return request


async def moment(rng: random.Random) -> None:
    await asyncio.sleep(rng.random() * 0.2)


async def cancels(server: Harness, rng: random.Random, count: int) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)

    async def one() -> None:
        call = rng.choice([stub.StreamGenerate, stub.Generate])(endless())
        await moment(rng)
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED

    await asyncio.gather(*(one() for _ in range(count)))


async def deadlines(server: Harness, rng: random.Random, count: int) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)

    async def one() -> None:
        method = rng.choice([stub.StreamGenerate, stub.Generate])
        # Some expire before the engine has heard of them; the others later, on a slow machine too.
        timeout = rng.uniform(0.0, 0.1) if rng.random() < 0.3 else rng.uniform(0.3, 0.7)
        call = method(endless(), timeout=timeout)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    await asyncio.gather(*(one() for _ in range(count)))


async def stream_resets(server: Harness, rng: random.Random, count: int) -> None:
    connection = await Connection.open(server.target)

    async def one() -> None:
        stream = connection.call(endless())
        if rng.random() < 0.7:
            await connection.until_answered({stream})
        await moment(rng)
        connection.reset_stream(stream)

    await asyncio.gather(*(one() for _ in range(count)))
    await connection.close()


async def connection_resets(server: Harness, rng: random.Random, count: int) -> None:
    await _connections(server, rng, count, Connection.reset)


async def closed_connections(server: Harness, rng: random.Random, count: int) -> None:
    await _connections(server, rng, count, Connection.close)


async def _connections(
    server: Harness, rng: random.Random, count: int, end: Callable[[Connection], Awaitable[None]]
) -> None:
    async def one(calls: int) -> None:
        connection = await Connection.open(server.target)
        streams = {connection.call(endless()) for _ in range(calls)}
        # Some end before the server has heard of them, the others amidst their answers.
        if rng.random() < 0.7:
            await connection.until_answered(streams)
        await moment(rng)
        await end(connection)

    await asyncio.gather(*(one(10) for _ in range(count // 10)))


async def killed_clients(server: Harness, rng: random.Random, count: int) -> None:
    """A process a hundred calls, which SIGKILL ends once all of them run."""
    program = [sys.executable, str(Path(__file__).with_name("doomed_client.py")), server.target]
    client = await asyncio.create_subprocess_exec(*program, str(count), stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert await client.stdout.readline() == b"all run\n"
    client.kill()
    await client.wait()


async def live(server: Harness) -> None:
    """An answer beside the faults: it comes, whole and right."""
    answer = await server.client.generate("abcdef", max_tokens=120)
    assert answer.text == "abcdef" * 20


async def commit(server: Harness, fault: Fault, rng: random.Random, count: int) -> None:
    for _ in range(count // AT_ONCE):
        await asyncio.gather(fault(server, rng, AT_ONCE), *(live(server) for _ in range(LIVE)))


@pytest.mark.parametrize(
    "fault",
    [cancels, deadlines, stream_resets, connection_resets, closed_connections, killed_clients],
)
async def test_nothing_is_kept_of_a_thousand(
    fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(11)
    engine = StubEngine(num_blocks=100_000, max_model_len=4096)
    async with running(engine) as server:
        # What is allocated once is no leak.
        await commit(server, fault, rng, AT_ONCE)
        await server.until_idle()
        before = holdings()
        await commit(server, fault, rng, FAULTS)
        await server.until_idle()
        await assert_given_back(before)
        assert len(engine.seen) > FAULTS // 2
    # Clients leave at all times: that is no error of the server's.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
