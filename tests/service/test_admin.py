"""What operators ask of a running server: its load, aborts, a drain, an empty cache."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.errors import Unavailable
from zllm.service import generation
from zllm.service.config import ServerConfig
from zllm.v1 import admin_pb2

SLOW = {"ignore_eos": True, "max_tokens": 200, "timeout": 30}


async def begin(server: Harness, count: int = 1) -> list[asyncio.Task[object]]:
    """So many requests that run."""
    tasks = [
        asyncio.create_task(server.client.generate("abc", request_id=f"r{n}", **SLOW))
        for n in range(count)
    ]
    await server.until(lambda load: load.running_requests == count, "they never ran")
    return tasks


async def test_watch_load_tells_each_change_and_no_more() -> None:
    async with running(StubEngine(step_s=0.02)) as server:
        interval = Duration(nanos=50_000_000)
        watch = server.admin.WatchLoad(admin_pb2.WatchLoadRequest(min_interval=interval))
        assert (await watch.read()).loads[0].running_requests == 0
        tasks = await begin(server, 2)
        snapshots = []
        async with asyncio.timeout(5):
            while not snapshots or snapshots[-1].running_requests != 2:
                snapshots.append((await watch.read()).loads[0])
        assert all(a != b for a, b in itertools.pairwise(snapshots))
        watch.cancel()
        await server.admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        await asyncio.gather(*tasks)


async def test_watch_load_refuses_an_interval_that_is_none() -> None:
    async with running() as server:
        watch = server.admin.WatchLoad(admin_pb2.WatchLoadRequest(min_interval=Duration()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_abort_by_id_ends_one_with_its_partial_text() -> None:
    async with running(StubEngine(step_s=0.02)) as server:
        tasks = await begin(server, 2)
        wanted = admin_pb2.AbortRequestsRequest(request_ids=["r1", "nobody"])
        assert (await server.admin.AbortRequests(wanted)).aborted_request_ids == ["r1"]
        answer = await tasks[1]
        assert answer.finish_reason == "aborted"
        assert ("abc" * 70).startswith(answer.text)
        assert not tasks[0].done()
        assert not (await server.admin.AbortRequests(wanted)).aborted_request_ids
        everything = admin_pb2.AbortRequestsRequest(all=True)
        assert (await server.admin.AbortRequests(everything)).aborted_request_ids == ["r0"]
        assert (await tasks[0]).finish_reason == "aborted"
        await server.until_idle()


async def test_an_answer_that_is_only_still_being_sent_is_not_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, sent = asyncio.Event(), asyncio.Event()

    async def write(run: Any, _: Any) -> None:
        await run.stream.take_whole()
        whole.set()
        await sent.wait()

    monkeypatch.setattr(generation, "_write_stream", write)
    async with running() as server:

        async def read() -> None:
            async for _ in server.client.stream("abc", max_tokens=3):
                pass

        reading = asyncio.create_task(read())
        async with asyncio.timeout(5):
            await whole.wait()
        everything = admin_pb2.AbortRequestsRequest(all=True)
        assert not (await server.admin.AbortRequests(everything)).aborted_request_ids
        sent.set()
        await reading


async def test_flush_cache_counts_the_blocks_of_the_engine() -> None:
    async with running() as server:
        freed = [
            (await server.admin.FlushCache(admin_pb2.FlushCacheRequest())).blocks_freed
            for _ in range(2)
        ]
        assert freed == [7, 0]


async def test_drain_refuses_new_work_and_lets_the_running_finish() -> None:
    async with running(StubEngine(step_s=0.005)) as server:
        (task,) = await begin(server)
        drain = asyncio.ensure_future(server.admin.Drain(admin_pb2.DrainRequest()))
        await server.until(lambda load: load.draining, "it never drained")
        health = health_pb2_grpc.HealthStub(server.channel)
        async with asyncio.timeout(5):
            while True:
                status = (await health.Check(health_pb2.HealthCheckRequest())).status
                if status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break
        with pytest.raises(Unavailable, match="draining"):
            await server.client.generate("abc")
        assert (await task).finish_reason == "length"
        async with asyncio.timeout(5):
            assert (await drain).remaining_requests == 0
        await server.until_idle()


async def test_what_outlasts_the_drains_timeout_ends_with_shutdown() -> None:
    async with running(StubEngine(step_s=0.05)) as server:
        (task,) = await begin(server)
        request = admin_pb2.DrainRequest(timeout=Duration(nanos=200_000_000))
        assert (await server.admin.Drain(request)).remaining_requests == 1
        answer = await task
        assert answer.finish_reason == "shutdown"
        assert answer.text
        await server.until_idle()


async def test_a_drain_that_another_one_cuts_short_counts_what_was_ended() -> None:
    async with running(StubEngine(step_s=0.05)) as server:
        tasks = await begin(server, 3)
        drain = asyncio.ensure_future(server.admin.Drain(admin_pb2.DrainRequest()))
        await server.until(lambda load: load.draining, "it never drained")
        assert await server.server.drain(0.1) == 3  # as by SIGTERM
        assert (await drain).remaining_requests == 3
        assert {(await task).finish_reason for task in tasks} == {"shutdown"}


async def test_who_is_still_tokenizing_when_a_drain_ends_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = generation.prompt_ids

    async def slow(request: Any, model: Any) -> list[int]:
        await asyncio.sleep(0.3)
        return await plain(request, model)

    monkeypatch.setattr(generation, "prompt_ids", slow)
    async with running(StubEngine(step_s=0.05)) as server:
        asking = asyncio.create_task(server.client.generate("abc", **SLOW))
        await asyncio.sleep(0.1)
        request = admin_pb2.DrainRequest(timeout=Duration(nanos=1))
        assert (await server.admin.Drain(request)).remaining_requests == 1
        with pytest.raises(Unavailable, match="draining"):
            await asyncio.wait_for(asking, 0.1)  # the drain waited for it


async def test_work_is_still_taken_in_the_drain_delay() -> None:
    config = ServerConfig(port=0, admin_port=0, drain_delay=1.0)
    async with running(config=config) as server:
        drain = asyncio.ensure_future(server.admin.Drain(admin_pb2.DrainRequest()))
        await server.until(lambda load: load.draining, "it never drained")
        signalled = asyncio.ensure_future(server.server.drain(30.0))  # as by SIGTERM, meanwhile
        await asyncio.sleep(0.1)
        assert (await server.client.generate("abc", max_tokens=2)).text == "ab"
        await asyncio.gather(drain, signalled)
        with pytest.raises(Unavailable, match="draining"):
            await server.client.generate("abc")
