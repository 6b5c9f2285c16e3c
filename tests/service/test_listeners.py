"""The two listeners: models, tokenizing, load, info, reflection, ports, and leaving in order."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.service.harness import running
from tests.service.stub_engine import EOS, VOCAB, StubEngine
from zllm.clients.aio import AsyncClient, AsyncStream
from zllm.clients.results import Delta
from zllm.errors import ConfigError, InvalidRequest, Unavailable, UnknownModel
from zllm.service.config import ServerConfig
from zllm.service.server import Server
from zllm.v1 import admin_pb2, models_pb2, models_pb2_grpc


async def test_models_are_listed_as_they_are_served() -> None:
    async with running() as server:
        (model,) = await server.client.models()
        stub = models_pb2_grpc.ModelServiceStub(server.channel)
        one = await stub.GetModel(models_pb2.GetModelRequest(name="stub"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetModel(models_pb2.GetModelRequest(name="nobody"))
    assert (model.name, model.vocab_size, model.max_context_tokens) == ("stub", VOCAB, 256)
    assert model.eos_token_ids == (EOS,)
    assert model.weight_format == one.model.weight_format == "float32"
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("text", ["", "Monday 12 + 7", "日本🙂", "a<|im_start|>b", "x " * 5000])
async def test_tokenize_and_detokenize_are_inverse(text: str) -> None:
    async with running() as server:
        ids = await server.client.tokenize(text)
        assert await server.client.detokenize(ids) == text
        stub = models_pb2_grpc.ModelServiceStub(server.channel)
        answer = await stub.Tokenize(models_pb2.TokenizeRequest(text=text))
    assert b"".join(answer.tokens) == text.encode()
    assert all(0 <= token_id < VOCAB for token_id in ids)


async def test_detokenize_checks_its_ids_and_its_model() -> None:
    async with running() as server:
        with pytest.raises(InvalidRequest) as caught:
            await server.client.detokenize([1, VOCAB])
        assert caught.value.field == "ids[1]"
        for call in (
            server.client.detokenize([1], model="x"),
            server.client.tokenize("a", model="x"),
        ):
            with pytest.raises(UnknownModel):
                await call


async def test_the_load_follows_the_work() -> None:
    async with running(StubEngine(step_s=0.02, max_running=2)) as server:
        streams = [server.client.stream("abc" * 20) for _ in range(3)]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        load = await server.until(
            lambda load: load.running_requests == 2 and load.queued_requests == 1, "no load"
        )
        assert load.model == "stub"
        assert load.queued_tokens > 0
        assert load.kv_blocks_free < load.kv_blocks_total
        assert not load.draining
        for reader in readers:
            reader.cancel()
        await server.until_idle()


async def test_server_info_shows_the_configuration_and_one_instance() -> None:
    async with running() as server:
        first = await server.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
        second = await server.admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
    assert first.version == "test"
    assert first.instance_id == second.instance_id != ""
    assert json.loads(first.config_json)["server"]["host"] == "127.0.0.1"
    assert [model.name for model in first.models] == ["stub"]


@pytest.mark.parametrize(("flag", "shown"), [(None, True), (True, True), (False, False)])
async def test_reflection_is_a_flag_and_on_for_loopback(flag: bool | None, shown: bool) -> None:
    config = ServerConfig(port=0, admin_port=0, reflection=flag)
    async with running(config=config) as server:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        if not shown:
            # Not as a stream: grpc.aio says INTERNAL where the refusal comes while it sends.
            name = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
            ask = server.channel.unary_unary(f"/{name}/ServerReflectionInfo")
            assert await ask(request.SerializeToString()).code() is grpc.StatusCode.UNIMPLEMENTED
            return
        call = stub.ServerReflectionInfo(iter([request]))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert {"zllm.v1.GenerationService", "zllm.v1.ModelService", "grpc.health.v1.Health"} <= names


async def _reflects(host: str, port: int) -> bool:
    async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
        name = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
        call = channel.stream_stream(f"/{name}/ServerReflectionInfo")()
        await call.done_writing()
        return await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("flag", [None, True])
@pytest.mark.parametrize(
    ("host", "admin_host"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")]
)
async def test_reflection_is_each_listeners_own_and_off_beyond_loopback(
    host: str, admin_host: str, flag: bool | None
) -> None:
    config = ServerConfig(
        host=host, admin_host=admin_host, port=0, admin_port=0, insecure=True, reflection=flag
    )
    async with running(config=config) as server:
        shown = [
            await _reflects("127.0.0.1", port) for port in (server.server.port, server.admin_port)
        ]
    assert shown == [flag or host == "127.0.0.1", flag or admin_host == "127.0.0.1"]


async def test_a_taken_port_is_a_config_error_that_says_what_to_do() -> None:
    async with running() as server:
        config = ServerConfig(port=server.server.port, admin_port=0)
        second = Server(config)
        with pytest.raises(ConfigError, match="--port"):
            await second.start()
        await second.stop(0.0)


async def test_while_the_model_loads_the_server_is_there_but_unavailable() -> None:
    server = Server(ServerConfig(port=0, admin_port=0), names=["tiny"], awaits=["tiny"])
    await server.start()
    target = f"127.0.0.1:{server.port}"
    async with AsyncClient(target, attempts=1) as client, grpc.aio.insecure_channel(target) as raw:
        with pytest.raises(Unavailable, match="loading"):
            await client.generate("abc")
        with pytest.raises(Unavailable, match="loading"):
            await client.tokenize("abc")
        assert await client.models() == []
        health = health_pb2_grpc.HealthStub(raw)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.stop(0.0)


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70000}, {"admin_port": -1}, {"queue_timeout": -1.0}, {"engine_timeout": 0.0}],
)
def test_settings_out_of_range_are_config_errors(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**wrong)


async def test_a_stop_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with running(StubEngine(step_s=0.02)) as server:
        running_one = asyncio.create_task(server.client.generate("abc", max_tokens=30))
        await server.until(lambda load: load.running_requests == 1, "nothing runs")
        stopping = asyncio.create_task(server.server.stop(grace=10))
        await asyncio.sleep(0.05)
        with pytest.raises(Unavailable):
            await server.client.generate("abc")
        assert (await running_one).finish_reason == "length"
        await stopping


async def test_after_the_grace_streams_end_with_shutdown_and_keep_their_text() -> None:
    async with running(StubEngine(step_s=0.02)) as server:
        whole = asyncio.create_task(server.client.generate("abc"))
        stream = asyncio.create_task(read(server.client.stream("abc")))
        await server.until(lambda load: load.running_requests == 2, "nothing runs")
        await asyncio.sleep(0.1)
        await server.server.stop(grace=0.1)
        assert (await whole).finish_reason == "shutdown"
        assert (await whole).text.startswith("abc")
        assert (await stream)[-1].finish_reason == "shutdown"


async def read(stream: AsyncStream) -> list[Delta]:
    return [delta async for delta in stream]
