"""API keys over real loopback gRPC: who gets in, to what, and how much of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.clients.aio import AsyncClient
from zllm.clients.client import Client
from zllm.errors import (
    ConfigError,
    Forbidden,
    Overloaded,
    RequestExists,
    Unauthenticated,
    UnknownModel,
)
from zllm.service import reloading
from zllm.service.auth import ApiKeys, load_keys
from zllm.service.config import ServerConfig
from zllm.service.tenants import Caller, Grant

ACME, BETA = "acme-key-0123456789", "beta-key-0123456789"


def write(folder: Path, *entries: dict[str, Any]) -> ServerConfig:
    file = folder / "keys.json"
    file.write_text(json.dumps({"keys": entries}))
    return ServerConfig(port=0, admin_port=0, api_keys=str(file))


def acme(**limits: Any) -> dict[str, Any]:
    return {"key": ACME, "tenant": "acme", **limits}


def beta(**limits: Any) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(BETA.encode()).hexdigest(), "tenant": "beta", **limits}


def caller(server: Harness, key: str) -> AsyncClient:
    return AsyncClient(server.target, attempts=1, api_key=key)


async def test_keys_as_given_and_as_sha256_get_in_by_both_clients(tmp_path: Path) -> None:
    async with running(config=write(tmp_path, acme(), beta())) as server:
        for key in (ACME, BETA):
            async with caller(server, key) as client:
                assert (await client.generate("abc", max_tokens=3)).text == "abc"
                assert [d.text async for d in client.chat("abc", max_tokens=1)]

        def ask() -> list[str]:
            with Client(server.target, attempts=1, api_key=ACME) as client:
                streamed = "".join(delta.text for delta in client.stream("abc", max_tokens=3))
                return [client.generate("abc", max_tokens=3).text, streamed]

        assert await asyncio.to_thread(ask) == ["abc", "abc"]
        assert [request.tenant for request in server.engine.seen] == [
            "acme", "acme", "beta", "beta", "acme", "acme",
        ]  # fmt: skip


def test_a_sha256_may_be_in_capitals(tmp_path: Path) -> None:
    digest = hashlib.sha256(ACME.encode()).hexdigest().upper()
    keys = ApiKeys(write(tmp_path, {"sha256": digest, "tenant": "acme"}).api_keys)
    assert keys.caller({"authorization": f"Bearer {ACME}"}).tenant == "acme"


@pytest.mark.parametrize("key", ["", "x", ACME[:-1], ACME + "x", ACME.upper()])
async def test_without_a_known_key_every_call_is_unauthenticated(tmp_path: Path, key: str) -> None:
    async with running(config=write(tmp_path, acme())) as server:
        async with caller(server, key) as client:
            for call in (
                client.generate("abc"),
                client.models(),
                client.tokenize("abc"),
                client.detokenize([1]),
            ):
                with pytest.raises(Unauthenticated) as caught:
                    await call
                assert "acme" not in str(caught.value)
            with pytest.raises(Unauthenticated):
                [delta async for delta in client.stream("abc")]
        assert not server.engine.seen


@pytest.mark.parametrize("value", ["Basic abc", "Bearer", "Bearer ", ACME])
async def test_another_scheme_is_unauthenticated(tmp_path: Path, value: str) -> None:
    async with running(config=write(tmp_path, acme())) as server:
        # Bytes that are no message are not even parsed before the key is known.
        call = server.channel.unary_unary("/zllm.v1.GenerationService/Generate")
        answer = call(b"\xff", metadata=(("authorization", value),))
        assert await answer.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = call(b"\xff", metadata=(("authorization", f"bearer {ACME}"),))
        assert await answer.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_and_the_admin_listener_ask_for_no_key(tmp_path: Path) -> None:
    async with running(config=write(tmp_path, acme())) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert (await server.load()).model == "stub"


async def test_a_key_sees_and_uses_only_its_models(tmp_path: Path) -> None:
    config = write(tmp_path, acme(models=["stub", "later"]), beta(models=["other"]))
    async with running(config=config) as server:
        async with caller(server, ACME) as client:
            assert [model.name for model in await client.models()] == ["stub"]
            assert (await client.generate("abc", model="stub", max_tokens=3)).text == "abc"
            with pytest.raises(UnknownModel):
                await client.tokenize("abc", model="later")
        async with caller(server, BETA) as client:
            assert await client.models() == []
            # Served or not, the answer is the same.
            for name in ("stub", "nobody", ""):
                with pytest.raises(Forbidden):
                    await client.generate("abc", model=name)
                with pytest.raises(Forbidden):
                    await client.tokenize("abc", model=name)
                with pytest.raises(Forbidden):
                    await client.detokenize([40], model=name)


async def test_requests_beyond_a_keys_number_are_refused_and_others_are_not(
    tmp_path: Path,
) -> None:
    config = write(tmp_path, acme(max_concurrent_requests=2), beta())
    async with (
        running(StubEngine(step_s=0.02), config) as server,
        caller(server, ACME) as client,
        caller(server, BETA) as other,
    ):
        tasks = [asyncio.create_task(client.generate("abc")) for _ in range(2)]
        await server.until(lambda load: load.running_requests == 2, "nothing runs")
        with pytest.raises(Overloaded, match="acme") as caught:
            await client.generate("abc")
        assert caught.value.retry_after > 0
        await other.generate("abc", max_tokens=1)
        for task in tasks:
            task.cancel()
        await server.until_idle()
        await client.generate("abc", max_tokens=1)


async def test_each_of_two_frontends_lets_in_half_of_a_keys_number(tmp_path: Path) -> None:
    config = replace(write(tmp_path, acme(max_concurrent_requests=2)), frontends=2)
    async with (
        running(StubEngine(step_s=0.1), config) as server,
        caller(server, ACME) as client,
    ):
        task = asyncio.create_task(client.generate("abc"))
        await server.until(lambda load: load.running_requests == 1, "nothing runs")
        with pytest.raises(Overloaded, match="acme"):
            await client.generate("abc")
        task.cancel()
        await server.until_idle()


async def test_a_spent_minute_is_refused_with_the_time_to_wait(tmp_path: Path) -> None:
    config = write(tmp_path, acme(tokens_per_minute=60), beta())
    async with (
        running(config=config) as server,
        caller(server, ACME) as client,
        caller(server, BETA) as other,
    ):
        await client.generate([1] * 40, max_tokens=50)
        with pytest.raises(Overloaded, match="60 tokens a minute") as caught:
            await client.generate("abc")
        # 90 used of 60; the debt shrinks by one a second.
        assert 20 < caught.value.retry_after <= 31
        await other.generate("abc", max_tokens=3)


async def test_an_entry_of_zeros_lets_nobody_in(tmp_path: Path) -> None:
    config = write(tmp_path, {"sha256": "0" * 64, "tenant": "disabled"})
    async with running(config=config) as server, caller(server, "any-key-at-all-16") as client:
        with pytest.raises(Unauthenticated):
            await client.generate("abc")


@pytest.mark.parametrize(
    "text", ["keys: 2026-13-45", "[" * 5000, "keys: !!int x", "keys: !!bool x"]
)
def test_whatever_the_parser_raises_is_a_bad_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        load_keys(str(tmp_path / "keys.yaml"))


async def test_what_a_stream_gives_is_charged(tmp_path: Path) -> None:
    config = write(tmp_path, acme(tokens_per_minute=60))
    async with running(config=config) as server, caller(server, ACME) as client:
        async for _ in client.stream([1] * 10, max_tokens=80):
            pass
        with pytest.raises(Overloaded, match="60 tokens a minute"):
            await client.generate("abc")


async def test_tokens_that_nobody_took_are_charged(tmp_path: Path) -> None:
    config = write(tmp_path, acme(tokens_per_minute=60))
    async with (
        running(StubEngine(step_s=0.002), config=config) as server,
        caller(server, ACME) as client,
    ):
        with pytest.raises(TimeoutError):
            await client.generate("abc", max_tokens=200, ignore_eos=True, timeout=0.3)
        await server.until_idle()
        with pytest.raises(Overloaded, match="60 tokens a minute"):
            await client.generate("abc")


async def test_what_is_refused_is_not_charged(tmp_path: Path) -> None:
    config = write(tmp_path, acme(tokens_per_minute=100))
    engine = StubEngine(max_queued=0)
    async with running(engine, config=config) as server, caller(server, ACME) as client:
        for _ in range(5):
            with pytest.raises(Overloaded, match="queue is full"):
                await client.generate([1] * 60)
        engine.max_queued = 1
        await client.generate([1] * 60, max_tokens=1)


def test_tokens_come_back_with_time() -> None:
    now = [100.0]
    one = Caller(Grant(tenant="a", tokens_per_minute=60), clock=lambda: now[0])
    one.charge(90)
    with pytest.raises(Overloaded) as caught, one.request():
        pass
    now[0] += caught.value.retry_after
    with one.request():
        pass
    one.charge(30)
    with pytest.raises(Overloaded), one.request():
        pass
    assert one.usage.running == 0


async def test_no_tenant_meets_anothers_prompts_in_the_cache(tmp_path: Path) -> None:
    async with (
        running(config=write(tmp_path, acme(), beta())) as server,
        caller(server, ACME) as client,
        caller(server, BETA) as other,
    ):
        for salt in ("", "s"):
            for one in (client, client, other):
                await one.generate("abc", max_tokens=1, cache_salt=salt)
        salts = [request.salt for request in server.engine.seen]
        assert salts[0] == salts[1] != salts[2]
        assert salts[3] == salts[4] != salts[5]
        assert len(set(salts)) == 4


async def test_a_request_id_is_live_for_its_own_tenant_only(tmp_path: Path) -> None:
    async with (
        running(StubEngine(step_s=0.02), write(tmp_path, acme(), beta())) as server,
        caller(server, ACME) as client,
        caller(server, BETA) as other,
    ):
        task = asyncio.create_task(client.generate("abc", request_id="r"))
        await server.until(lambda load: load.running_requests == 1, "nothing runs")
        with pytest.raises(RequestExists):
            await client.generate("abc", request_id="r")
        await other.generate("abc", request_id="r", max_tokens=1)
        task.cancel()
        await server.until_idle()


async def test_the_file_is_read_anew_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    config = write(tmp_path, acme())
    async with (
        running(config=config) as server,
        caller(server, ACME) as client,
        caller(server, BETA) as other,
    ):
        with pytest.raises(Unauthenticated):
            await other.models()
        write(tmp_path, beta())
        assert await other.models()
        with pytest.raises(Unauthenticated):
            await client.models()
        Path(config.api_keys).write_text("keys: [")
        assert await other.models()


def test_every_key_is_compared_whole_whichever_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [acme(), *({"key": f"{n:016d}", "tenant": "t"} for n in range(9))]
    keys = ApiKeys(write(tmp_path, *entries).api_keys)
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    assert keys.caller({"authorization": f"Bearer {ACME}"}).tenant == "acme"
    with pytest.raises(Unauthenticated):
        keys.caller({"authorization": "Bearer nobody"})
    assert len(compared) == 20
    assert all(len(a) == len(b) == 32 for a, b in compared)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"tenant": "a"}, "either `key` or `sha256`"),
        ({"key": "short", "tenant": "a"}, "16 printable"),
        ({"sha256": "12", "tenant": "a"}, "64 hexadecimal"),
        ({"key": ACME}, "tenant"),
        ({"key": ACME, "tenant": "a\0b"}, "tenant"),
        ({"key": ACME, "tenant": "a", "modles": []}, "modles"),
        ({"key": ACME, "tenant": "a", "models": "tiny"}, "models"),
        ({"key": ACME, "tenant": "a", "tokens_per_minute": 0}, "tokens_per_minute"),
        ({"key": ACME, "tenant": "a", "max_concurrent_requests": True}, "max_concurrent"),
    ],
)
def test_a_wrong_entry_is_named_and_its_key_is_not(
    tmp_path: Path, entry: dict[str, Any], words: str
) -> None:
    config = write(tmp_path, entry)
    with pytest.raises(ConfigError, match=words) as caught:
        load_keys(config.api_keys)
    assert "keys[0]" in str(caught.value)
    assert ACME not in str(caught.value)


def test_a_file_without_keys_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match=str(file)):
        load_keys(str(file))
    for text in ("", "keys: []", "[1]", "keys: {", f"keys: [{ACME}]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="keys"):
            load_keys(str(file))
    file.write_text(json.dumps({"keys": [acme(), acme(tenant="b")]}))
    with pytest.raises(ConfigError, match="repeats"):
        load_keys(str(file))


async def test_a_prompt_beyond_the_servers_limit_is_refused() -> None:
    config = replace(ServerConfig(port=0, admin_port=0), max_prompt_tokens=10)
    async with running(config=config) as server:
        await server.client.generate([1] * 10, max_tokens=1)
        with pytest.raises(Exception, match="takes 10"):
            await server.client.generate([1] * 11, max_tokens=1)


async def test_oversized_metadata_is_refused_and_the_server_lives() -> None:
    config = ServerConfig(port=0, admin_port=0, max_metadata_bytes=2048)
    async with running(config=config) as server:
        call = server.channel.unary_unary("/zllm.v1.ModelService/ListModels")
        assert await call(b"", metadata=(("x", "a" * 1000),)).code() is grpc.StatusCode.OK
        refused = call(b"", metadata=(("x", "a" * 20_000),))
        assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await server.client.models()


async def test_streams_beyond_a_connections_number_wait_in_the_client() -> None:
    config = ServerConfig(port=0, admin_port=0, max_streams_per_connection=2)
    async with running(StubEngine(step_s=0.01), config) as server:
        tasks = [
            asyncio.create_task(server.client.generate("abc", max_tokens=100)) for _ in range(3)
        ]
        await server.until(lambda load: load.running_requests == 2, "nothing runs")
        await asyncio.sleep(0.2)
        assert len(server.engine.seen) == 2
        await asyncio.gather(*tasks)
        assert len(server.engine.seen) == 3


async def test_those_that_waited_in_the_client_are_all_answered() -> None:
    config = ServerConfig(port=0, admin_port=0, max_streams_per_connection=4)
    async with running(config=config) as server:
        answers = await asyncio.gather(
            *(server.client.generate("abc", max_tokens=2) for _ in range(200))
        )
    assert {answer.text for answer in answers} == {"ab"}


async def test_connections_beyond_the_number_are_dropped() -> None:
    config = ServerConfig(port=0, admin_port=0, max_connections=2)
    async with running(config=config) as server:
        open_now = [await asyncio.open_connection("127.0.0.1", server.server.port) for _ in "123"]
        # An HTTP/2 server speaks first once a connection is its own; a dropped one ends.
        first = [await asyncio.wait_for(reader.read(9), 5) for reader, _ in open_now]
        assert sum(bool(data) for data in first) <= 2
        assert not all(first)
        for _, writer in open_now:
            writer.close()
