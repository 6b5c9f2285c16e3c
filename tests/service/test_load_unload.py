"""LoadModel and UnloadModel: what comes is served, what goes drains, what fails leaves nothing."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.service.harness import running
from tests.service.stub_server import STUB, Served, answers, engines, serving
from tests.service.test_processes import ask, copy_model, edit_json, is_gone
from tests.service.test_processes import serving as serving_command
from zllm.clients.aio import AsyncClient
from zllm.clients.client import Client
from zllm.errors import ConfigError, InvalidRequest, Unavailable, UnknownModel
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service import generation, restarts
from zllm.service.engine_client import EngineClient
from zllm.service.model_folders import find_folder
from zllm.service.supervisor import EngineProcess
from zllm.v1 import admin_pb2, admin_pb2_grpc

STUCK = """
import json, os, runpy, sys
line = b""
while not line.endswith(b"\\n"):
    line += os.read(0, 65536)
if json.loads(line)["served_model_name"] == "stuck":
    while os.read(0, 65536):
        pass
    sys.exit()
runpy.run_path({stub!r}, run_name="__main__")
"""
STUCK_COMMAND = (sys.executable, "-c", STUCK.format(stub=str(STUB)))
"""Stub engines, of which that of the model `stuck` never ends to load."""


@asynccontextmanager
async def administering(
    served: Served,
) -> AsyncIterator[tuple[admin_pb2_grpc.AdminServiceStub, AsyncClient]]:
    async with (
        grpc.aio.insecure_channel(served.admin_target) as channel,
        AsyncClient(served.target, attempts=1) as client,
    ):
        yield admin_pb2_grpc.AdminServiceStub(channel), client


def load_request(name: str, **settings: Any) -> admin_pb2.LoadModelRequest:
    return admin_pb2.LoadModelRequest(name=name, path=str(EMBEDDED_MODEL), **settings)


def unload_request(name: str, grace: float = 30.0) -> admin_pb2.UnloadModelRequest:
    timeout = Duration()
    timeout.FromNanoseconds(int(grace * 1e9))
    return admin_pb2.UnloadModelRequest(name=name, timeout=timeout)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def until_engines(count: int) -> None:
    async with asyncio.timeout(10):
        while len(engines()) != count:
            await asyncio.sleep(0.02)


async def is_expected(client: AsyncClient, name: str) -> bool:
    """Whether a model of that name is served or loading."""
    try:
        await client.tokenize("abc", model=name)
    except UnknownModel:
        return False
    except Unavailable:
        pass
    return True


async def test_who_is_still_tokenizing_when_the_model_goes_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaving = asyncio.Event()
    plain, shut_down = generation.prompt_ids, EngineClient.shut_down

    async def held_up(request: Any, model: Any) -> list[int]:
        if model.name == "two":
            await leaving.wait()
        return await plain(request, model)

    def told(client: EngineClient) -> None:
        shut_down(client)
        leaving.set()

    monkeypatch.setattr(generation, "prompt_ids", held_up)
    monkeypatch.setattr(EngineClient, "shut_down", told)
    async with serving(names=("one", "two")) as served, administering(served) as (admin, client):
        asking = asyncio.create_task(client.generate("abc", model="two", max_tokens=3))
        await asyncio.sleep(0.1)
        await admin.UnloadModel(unload_request("two"))
        with pytest.raises(Unavailable):
            await asyncio.wait_for(asking, 5)


def test_a_model_comes_and_goes_while_another_serves() -> None:
    with serving_command() as served, served.admin() as admin, Client(served.target) as client:
        first = served.engine()
        loaded = admin.LoadModel(load_request("late"))
        assert loaded.model.name == "late"
        assert [model.name for model in client.models()] == ["tiny", "late"]
        _, second = served.engines()
        assert ask(served.target, "What is 12 + 7?", "late") == "12 + 7 = 19"

        deltas = iter(client.chat("Count from 1 to 99.", model="late", max_tokens=60))
        next(deltas)
        admin.UnloadModel(admin_pb2.UnloadModelRequest(name="late"))
        assert [delta.finish_reason for delta in deltas][-1] in ("length", "eos")
        assert is_gone(second)
        with pytest.raises(UnknownModel, match="served: tiny"):
            client.generate("x", model="late")
        assert [model.name for model in client.models()] == ["tiny"]

        admin.LoadModel(load_request("late"))
        assert ask(served.target, "What is 12 + 7?", "late") == "12 + 7 = 19"
        admin.UnloadModel(admin_pb2.UnloadModelRequest(name="tiny"))
        assert is_gone(first)
        assert ask(served.target, "What is 12 + 7?") == "12 + 7 = 19"
        served.until_idle()
        assert served.end() == 0


def test_a_model_that_fails_to_load_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    edit_json(folder / "config.json", architectures=["GibberishForCausalLM"])
    with serving_command("--model-root", str(tmp_path)) as served, served.admin() as admin:
        request = admin_pb2.LoadModelRequest(name="broken", path="model")
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                admin.LoadModel(request)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "GibberishForCausalLM" in caught.value.details()
        served.engine()
        with Client(served.target, attempts=1) as client:
            assert [model.name for model in client.models()] == ["tiny"]
            with pytest.raises(UnknownModel):
                client.generate("x", model="broken")
        assert ask(served.target, "What is 12 + 7?") == "12 + 7 = 19"


async def test_a_model_that_never_ends_to_load_is_ended() -> None:
    config = EngineConfig(model=EMBEDDED_MODEL, served_model_name="stuck")
    engine = EngineProcess(config, timeout=60, command=STUCK_COMMAND)
    with pytest.raises(ConfigError, match="--load-timeout"):
        await engine.start(load_timeout=0.5)
    assert not engines()


async def test_a_load_that_hangs_keeps_no_other_model_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "OTHER_LOAD_S", 0.2)
    async with serving(STUCK_COMMAND) as served, administering(served) as (admin, _):
        (first,) = engines()
        loading = asyncio.ensure_future(admin.LoadModel(load_request("stuck")))
        await until_engines(2)
        first.kill()
        await served.until_health(False, service="model/stub")
        await served.until_health(True, service="model/stub")
        await answers(served.target, "stub")
        loading.cancel()
        await until_engines(1)


async def test_a_folder_that_cannot_be_read_in_time_is_given_up(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")  # like a file server that does not answer
    async with serving(load_timeout=1.0) as served, administering(served) as (admin, _):
        code, words = await refusal(
            admin.LoadModel(admin_pb2.LoadModelRequest(name="hangs", path=str(folder)))
        )
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "--load-timeout" in words
        await answers(served.target)


async def test_a_model_that_has_been_unloaded_is_not_added_by_its_engines_restart() -> None:
    async with running() as server:
        await server.server.remove("stub")
        await server.server.add("stub", server.engine.ready(), server.engine_client)
        assert not server.server.models


async def test_a_caller_that_leaves_ends_the_loading() -> None:
    async with serving(STUCK_COMMAND) as served, administering(served) as (admin, client):
        for _ in range(2):
            call = admin.LoadModel(load_request("stuck"))
            waiting = asyncio.ensure_future(refusal(admin.LoadModel(load_request("next"))))
            await until_engines(2)
            code, words = await refusal(admin.LoadModel(load_request("stuck")))
            assert code is grpc.StatusCode.ALREADY_EXISTS
            assert "loading" in words
            with pytest.raises(Unavailable, match="loading"):
                await client.generate("abc", model="stuck")
            refused = ("zllm:requests_refused_total", "stuck", "engine_unavailable")
            async with asyncio.timeout(10):  # a call may end after its client knows
                while (await served.scrape("reason")).get(refused) != 1:
                    await asyncio.sleep(0.02)
            code, words = await refusal(admin.UnloadModel(unload_request("stuck")))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            call.cancel()
            waiting.cancel()
            await until_engines(1)
            async with asyncio.timeout(10):
                while await is_expected(client, "stuck") or await is_expected(client, "next"):
                    await asyncio.sleep(0.02)
        await answers(served.target)


async def test_while_a_model_unloads_it_is_gone_for_new_requests_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.05")
    async with serving(names=["a", "b"]) as served, administering(served) as (admin, client):
        stream = client.stream("abc", model="b", ignore_eos=True, max_tokens=250)
        await anext(aiter(stream))
        unload = asyncio.ensure_future(admin.UnloadModel(unload_request("b")))
        async with asyncio.timeout(10):
            while await is_expected(client, "b"):
                await asyncio.sleep(0.02)
        code, words = await refusal(admin.UnloadModel(unload_request("b")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "unloading" in words
        code, words = await refusal(admin.LoadModel(load_request("b")))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "unloading" in words
        assert len(engines()) == 2
        stream.cancel()
        await unload
        await until_engines(1)
        code, _ = await refusal(admin.UnloadModel(unload_request("b")))
        assert code is grpc.StatusCode.NOT_FOUND
        await answers(served.target)


async def test_what_outlasts_an_unloads_grace_ends_with_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STUB_STEP_S", "0.05")
    async with serving(names=["a", "b"]) as served, administering(served) as (admin, client):
        deltas = aiter(client.stream("abc", model="b", ignore_eos=True, max_tokens=250))
        await anext(deltas)
        await admin.UnloadModel(unload_request("b", grace=0.1))
        assert [delta.finish_reason async for delta in deltas][-1] == "shutdown"
        await until_engines(1)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (load_request(""), "name"),
        (load_request("a\nb"), "name"),
        (load_request("x", memory_share=1.5), "memory_share"),
        (load_request("x", num_kv_blocks=0), "num_kv_blocks"),
        (admin_pb2.LoadModelRequest(name="x"), "path"),
        (admin_pb2.LoadModelRequest(name="x", path="relative"), "path"),
        (admin_pb2.LoadModelRequest(name="x", path="/no/such/folder"), "path"),
    ],
)
async def test_what_cannot_be_loaded_names_its_field(
    request_: admin_pb2.LoadModelRequest, field: str
) -> None:
    async with running() as server:
        code, words = await refusal(server.admin.LoadModel(request_))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words.startswith(f"{field}: ")


async def test_server_info_shows_what_the_engine_made_of_its_settings() -> None:
    async with serving(num_kv_blocks=None) as served, administering(served) as (admin, _):
        info = await admin.GetServerInfo(admin_pb2.GetServerInfoRequest())
        (engine,) = json.loads(info.config_json)["engines"]
        assert engine["served_model_name"] == "stub"
        assert engine["max_model_len"] == info.models[0].max_context_tokens
        assert engine["num_kv_blocks"] > 0
        assert engine["max_num_batched_tokens"] > 0


async def test_a_server_whose_memory_is_all_shared_out_loads_no_more() -> None:
    async with (
        serving(names=["a"], num_kv_blocks=None) as served,
        administering(served) as (admin, _),
    ):
        code, words = await refusal(admin.LoadModel(load_request("b")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "memory_share" in words
        code, words = await refusal(admin.LoadModel(load_request("a")))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "served" in words


def test_a_model_root_keeps_paths_within(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "model").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    assert find_folder("model", str(root)) == root / "model"
    assert find_folder(str(root / "model"), str(root)) == root / "model"
    for path in ("../outside", "link", str(outside), "/", "model/../../outside"):
        with pytest.raises(InvalidRequest, match="--model-root"):
            find_folder(path, str(root))
    with pytest.raises(InvalidRequest, match="no folder"):
        find_folder("absent", str(root))


@pytest.mark.parametrize("root", ["absent", "file", "x" * 300])
async def test_a_model_root_that_is_no_folder_does_not_start(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"--model-root {tmp_path / root}: .*folder"):
        async with serving(model_root=str(tmp_path / root)):
            pass
