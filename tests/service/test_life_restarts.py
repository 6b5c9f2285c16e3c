"""A dead or hung engine is replaced behind the same port, until it fails too often in a row."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.service.stub_server import STUB, answers, serving
from zllm.clients.aio import AsyncClient
from zllm.errors import Unavailable
from zllm.service import restarts
from zllm.service.serve import ENGINE_LOST
from zllm.v1 import generation_pb2, generation_pb2_grpc

ONCE = """
import os, runpy, sys
try:
    os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    sys.exit(7)
runpy.run_path({stub!r}, run_name="__main__")
"""


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


@pytest.mark.parametrize("stream", [False, True])
async def test_what_had_begun_in_a_killed_engine_is_not_run_again_by_the_client(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.02")
    async with serving() as served, AsyncClient(served.target) as client:
        await answers(served.target)

        async def ask() -> None:
            if not stream:
                await client.generate("abc", ignore_eos=True, max_tokens=200, timeout=20)
            async for _ in client.stream(
                "abc", ignore_eos=True, max_tokens=200, min_tokens_per_delta=200, timeout=20
            ):
                pass

        asked = asyncio.create_task(ask())
        async with asyncio.timeout(5):
            while (await served.scrape())["zllm:num_requests_running", "stub"] == 0:
                await asyncio.sleep(0.02)
        served.engine().kill()
        with pytest.raises(Unavailable, match="signal 9"):
            await asked


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
        assert "signal 9" in caught.value.details()
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


async def test_loads_that_take_long_to_fail_are_failures_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each takes longer than an engine must live to have recovered.
    monkeypatch.setattr(restarts, "STEADY_S", 0.01)
    once = ONCE.format(mark=str(tmp_path / "mark"), stub=str(STUB))
    command = (sys.executable, "-c", once)
    async with serving(command, max_restarts=2, restart_backoff=0.001) as served:
        served.engine().kill()
        async with asyncio.timeout(20):
            assert await asyncio.shield(served.task) == ENGINE_LOST


async def test_an_engine_that_lived_long_enough_has_recovered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "STEADY_S", 0.2)
    async with serving(max_restarts=1, restart_backoff=0.1) as served:
        for _ in range(3):
            await asyncio.sleep(0.3)
            served.engine().kill()
            await served.until_health(False)
            await served.until_health(True)
        await answers(served.target)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_in_the_midst_of_a_restart_ends_it(number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have it ignored
    async with serving(restart_backoff=30.0) as served:
        served.engine().kill()
        await served.until_health(False)
        os.kill(os.getpid(), number)
        async with asyncio.timeout(5):
            assert await served.task == 0
