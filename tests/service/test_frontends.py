"""Several frontends on one port: each loses its own streams alone, and all obey the supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from tests.service.stub_server import Served, engines, frontends, serving
from tests.service.test_processes import ask, is_gone
from tests.service.test_processes import serving as serving_command
from zllm.errors import ConfigError
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.messages import FinishReason
from zllm.service.config import ServerConfig
from zllm.service.control import COUNTS, Begin
from zllm.service.frontend_handle import FrontendHandle
from zllm.service.frontends import Frontends
from zllm.service.tenants import Grant
from zllm.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
"""Channels of one process otherwise share a connection, and with it a frontend."""


def port_of(target: str) -> int:
    return int(target.rpartition(":")[2])


def connections(frontend: psutil.Process, target: str) -> int:
    port = port_of(target)
    return sum(
        bool(found.raddr) and found.laddr.port == port for found in frontend.net_connections("tcp")
    )


@dataclass
class Stream:
    """One over a connection of its own, and so to a frontend of chance."""

    channel: grpc.aio.Channel
    call: grpc.aio.UnaryStreamCall
    frontend: psutil.Process

    async def ends(self) -> str:
        """How its answer ends: the finish reason, or the status that it failed with."""
        reason = ""
        try:
            while (message := await self.call.read()) is not grpc.aio.EOF:
                if message.HasField("delta") and message.delta.HasField("finish"):
                    reason = FinishReason(message.delta.finish.reason).name
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return reason


@asynccontextmanager
async def streaming(served: Served, model: str = "") -> AsyncIterator[list[Stream]]:
    """Streams that run, at least two at each frontend."""
    async with AsyncExitStack() as stack:
        streams: list[Stream] = []
        processes = frontends()
        while any(sum(s.frontend == process for s in streams) < 2 for process in processes):
            before = [connections(process, served.target) for process in processes]
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(served.target, options=OWN_CONNECTION)
            )
            request = generation_pb2.GenerateRequest(text="abc", model=model)
            request.stopping.max_tokens, request.stopping.ignore_eos = 100, True
            call = generation_pb2_grpc.GenerationServiceStub(channel).StreamGenerate(request)
            stack.callback(call.cancel)
            assert (await call.read()).HasField("started")
            after = [connections(process, served.target) for process in processes]
            (frontend,) = [
                process
                for process, old, new in zip(processes, before, after, strict=True)
                if new > old
            ]
            streams.append(Stream(channel, call, frontend))
        yield streams


async def generate(target: str, model: str = "") -> str:
    return (await answer_of(target, model)).outputs[0].text


async def answer_of(target: str, model: str = "") -> generation_pb2.GenerateResponse:
    """Over a connection of its own."""
    async with grpc.aio.insecure_channel(target, options=OWN_CONNECTION) as channel:
        request = generation_pb2.GenerateRequest(text="abc", model=model)
        request.stopping.max_tokens = 3
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        # A connection that the dying frontend had not accepted yet is reset, and made anew.
        return await stub.Generate(request, timeout=20, wait_for_ready=True)


async def until_frontends(count: int, without: psutil.Process | None = None) -> None:
    async with asyncio.timeout(20):
        while len([f for f in frontends() if f != without]) != count:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def admin_of(served: Served) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
    async with grpc.aio.insecure_channel(served.admin_target) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


async def until_idle(served: Served) -> None:
    """Every block is back and nothing runs or waits."""
    async with admin_of(served) as admin, asyncio.timeout(10):
        while True:
            loads = (await admin.GetLoad(admin_pb2.GetLoadRequest())).loads
            if all(
                load.kv_blocks_free == load.kv_blocks_total == 64
                and load.running_requests == load.queued_requests == 0
                for load in loads
            ):
                return
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def slow_stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """So slow that no stream ends by itself while a test sets out; returns the temporary folder."""
    monkeypatch.setenv("STUB_STEP_S", "0.02")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_a_killed_frontend_loses_its_own_streams_alone_and_is_replaced() -> None:
    async with serving(frontends=2) as served:
        async with streaming(served) as streams:
            doomed = streams[0].frontend
            doomed.kill()
            ends = await asyncio.gather(*(stream.ends() for stream in streams))
            for stream, end in zip(streams, ends, strict=True):
                lost = stream.frontend == doomed
                assert end == ("UNAVAILABLE" if lost else "LENGTH")
        await until_idle(served)
        await until_frontends(2, without=doomed)
        # The replacement takes connections too: streaming() waits for two at each frontend.
        async with streaming(served) as streams:
            assert len({stream.frontend for stream in streams}) == 2
            assert doomed not in {stream.frontend for stream in streams}
        await until_idle(served)


async def test_the_engine_ends_what_lost_frontends_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.2")  # each would run for 20 s
    async with serving(frontends=2) as served, streaming(served):
        for frontend in frontends():
            frontend.kill()
        await until_idle(served)


async def test_a_replacement_knows_no_model_that_has_been_unloaded() -> None:
    async with serving(frontends=2) as served, admin_of(served) as admin:
        await admin.LoadModel(admin_pb2.LoadModelRequest(name="late", path=str(EMBEDDED_MODEL)))
        await admin.UnloadModel(admin_pb2.UnloadModelRequest(name="late"))
        doomed = frontends()[0]
        doomed.kill()
        await until_frontends(2, without=doomed)
        request = generation_pb2.GenerateRequest(text="abc", model="late")
        async with streaming(served) as streams:
            for stream in streams:
                stub = generation_pb2_grpc.GenerationServiceStub(stream.channel)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(request)
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_stopped_frontend_is_replaced_and_the_engine_goes_on_for_the_others() -> None:
    async with serving(frontends=2, engine_timeout=1.0) as served:
        async with streaming(served) as streams:
            stopped = streams[0].frontend
            stopped.suspend()
            ends = await asyncio.gather(*(stream.ends() for stream in streams))
            for stream, end in zip(streams, ends, strict=True):
                lost = stream.frontend == stopped
                assert end == ("UNAVAILABLE" if lost else "LENGTH")
        assert is_gone(stopped)
        await until_idle(served)
        await until_frontends(2, without=stopped)


async def test_the_port_answers_while_a_frontend_is_replaced() -> None:
    async with serving(frontends=3, restart_backoff=0.5) as served:
        doomed = frontends()[0]
        doomed.kill()
        assert is_gone(doomed)
        for _ in range(20):
            assert await generate(served.target) == "abc"
        await until_frontends(3, without=doomed)


async def test_a_frontend_that_would_be_replaced_in_a_drain_is_not() -> None:
    async with serving(frontends=2, restart_backoff=1.5) as served, admin_of(served) as admin:
        doomed, other = frontends()
        doomed.kill()
        assert is_gone(doomed)
        await asyncio.sleep(0.2)  # its keeper has seen it, and waits
        await admin.Drain(admin_pb2.DrainRequest())
        await asyncio.sleep(3)
        assert frontends() == [other]


async def test_an_empty_model_is_the_first_for_a_frontend_that_began_without_its_engine() -> None:
    async with serving(frontends=2, names=["one", "two"], restart_backoff=1.0) as served:
        doomed = frontends()[0]
        engines()[0].kill()
        doomed.kill()
        await until_frontends(2, without=doomed)
        async with asyncio.timeout(20):
            while len(engines()) < 2:
                await asyncio.sleep(0.02)
        await served.until_health(True, service="model/one")
        answered: list[str] = []
        async with asyncio.timeout(20):
            while len(answered) < 30:
                with suppress(grpc.aio.AioRpcError):
                    answered.append((await answer_of(served.target)).model)
        assert set(answered) == {"one"}


async def test_a_lost_engine_is_lost_and_replaced_for_all_frontends() -> None:
    async with serving(frontends=2) as served:
        async with streaming(served) as streams:
            served.engine().kill()
            ends = await asyncio.gather(*(stream.ends() for stream in streams))
            assert set(ends) == {"UNAVAILABLE"}
        answered = 0
        async with asyncio.timeout(20):
            while answered < 20:  # in a row, so that it is hardly one frontend's luck
                try:
                    assert await generate(served.target) == "abc"
                    answered += 1
                except grpc.aio.AioRpcError:
                    answered = 0
        async with streaming(served) as streams:
            assert len(streams) >= 4
        await until_idle(served)
        assert (await served.scrape())["zllm:engine_restarts_total", "stub"] == 1


async def test_operators_reach_every_frontend() -> None:
    async with serving(frontends=2) as served, admin_of(served) as admin:
        await admin.LoadModel(admin_pb2.LoadModelRequest(name="late", path=str(EMBEDDED_MODEL)))
        async with streaming(served, "late") as streams:
            answer = await admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
            assert len(answer.aborted_request_ids) == len(streams)
            ends = await asyncio.gather(*(stream.ends() for stream in streams))
            assert set(ends) == {"ABORTED"}
        async with streaming(served, "late") as streams:
            request = admin_pb2.UnloadModelRequest(name="late")
            request.timeout.FromMilliseconds(50)
            await admin.UnloadModel(request)
            ends = await asyncio.gather(*(stream.ends() for stream in streams))
            assert set(ends) == {"SHUTDOWN"}
        assert len(engines()) == 1
        for _ in range(10):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(served.target, "late")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await until_idle(served)


def counts_of(frontend: psutil.Process) -> Path:
    """The folder of what all count: in memory, since a full disk would kill who writes there."""
    folder = Path(frontend.environ()[COUNTS])
    assert folder.is_dir()
    assert folder.parent == Path("/dev/shm") or not os.access("/dev/shm", os.W_OK)
    return folder


async def test_sigterm_drains_all_and_leaves_nothing(slow_stub: Path) -> None:
    async with serving(frontends=2) as served:
        children = [*frontends(), *engines()]
        counts = counts_of(children[0])
        async with streaming(served) as streams:
            os.kill(os.getpid(), signal.SIGTERM)
            ends = await asyncio.gather(*(stream.ends() for stream in streams))
            assert set(ends) == {"LENGTH"}
        assert await served.task == 0
        assert all(is_gone(child) for child in children)
        assert not list(slow_stub.glob("zllm-*"))
        assert not counts.exists()


async def test_a_second_sigterm_hurries_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.5")
    async with serving(frontends=2) as served, streaming(served) as streams:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
        ends = await asyncio.gather(*(stream.ends() for stream in streams))
        assert set(ends) == {"SHUTDOWN"}
        assert await served.task == 0


async def test_metrics_are_those_of_all_frontends_and_outlive_one() -> None:
    async with serving(frontends=2) as served:
        async with streaming(served) as streams:
            count = len(streams)
            await asyncio.gather(*(stream.ends() for stream in streams))
        requests = ("zllm:e2e_request_latency_seconds_count", "stub")
        found = await served.scrape()
        assert found[requests] == count
        assert found["zllm:engine_up", "stub"] == 1
        held = sum(frontend.memory_info().rss for frontend in frontends())
        own = psutil.Process().memory_info().rss
        assert found["process_resident_memory_bytes", ""] > 0.9 * held + 0.5 * own
        streams[0].frontend.kill()
        await until_frontends(2, without=streams[0].frontend)
        assert (await served.scrape())[requests] == count


def test_nothing_outlives_a_killed_supervisor(slow_stub: Path) -> None:
    with serving_command("--frontends", "2") as served:
        children = psutil.Process(served.process.pid).children()
        assert len(children) == 3
        counts = counts_of(next(c for c in children if COUNTS in c.environ()))
        assert ask(served.target, "What is 12 + 7?") == "12 + 7 = 19"
        served.process.kill()
        assert all(is_gone(child) for child in children)
        assert not list(slow_stub.glob("zllm-*"))
        assert not counts.exists()


async def test_a_taken_port_is_refused_even_where_it_is_shared() -> None:
    async with serving(frontends=2) as served:
        config = ServerConfig(port=port_of(served.target), admin_port=0, frontends=2)
        front = Frontends(config, version="test")
        with pytest.raises(ConfigError, match="--port"):
            await front.start()
        await front.stop(0.0)


async def test_a_frontend_that_cannot_begin_ends_the_start(slow_stub: Path) -> None:
    keys = slow_stub / "keys.yaml"
    keys.write_text("keys: []")
    config = ServerConfig(port=0, admin_port=0, frontends=2, api_keys=str(keys))
    front = Frontends(config, version="test")
    with pytest.raises(ConfigError, match="at least one key"):
        await front.start()
    await front.stop(0.0)
    assert not frontends()
    assert not list(slow_stub.glob("zllm-*"))


def test_limits_of_a_key_are_divided_among_frontends() -> None:
    grant = Grant(tenant="t", max_concurrent_requests=3, tokens_per_minute=100)
    half = grant.divided(2)
    assert (half.max_concurrent_requests, half.tokens_per_minute) == (1, 50)
    assert grant.divided(4).max_concurrent_requests == 1
    assert grant.divided(1) == grant
    assert Grant(tenant="t").divided(2) == Grant(tenant="t")


async def test_a_frontend_that_cannot_be_spawned_is_an_error_that_its_keeper_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zllm.service.frontend_handle.FRONTEND_COMMAND", ("/no/such/program",))
    handle = FrontendHandle()
    with pytest.raises(ConfigError, match="cannot be started"):
        await handle.start(Begin(ServerConfig(), "", 0, [], []), counts="")
    assert await handle.until_lost(1.0) == "it never began"
    await handle.stop()
