"""TLS over real loopback connections, and where the server refuses to listen."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.certificates import Authority
from tests.service.harness import running
from zllm.clients.aio import AsyncClient
from zllm.clients.client import Client
from zllm.clients.credentials import Tls
from zllm.errors import ConfigError, Unavailable
from zllm.service import reloading
from zllm.service.config import ServerConfig
from zllm.service.server import Server


def config(cert: str, key: str, client_ca: str = "") -> ServerConfig:
    return ServerConfig(port=0, admin_port=0, tls_cert=cert, tls_key=key, tls_client_ca=client_ca)


async def names(target: str, tls: Tls | None) -> list[str]:
    async with AsyncClient(target, attempts=1, tls=tls) as client:
        return [model.name for model in await client.models(timeout=5)]


async def test_both_clients_reach_a_server_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with running(config=config(*authority.sign("server"))) as server:
        tls = Tls(ca=authority.ca)
        async with AsyncClient(server.target, attempts=1, tls=tls) as client:
            assert (await client.generate("abc", max_tokens=3)).text == "abc"

        def ask() -> str:
            with Client(server.target, attempts=1, tls=tls) as client:
                return client.generate("abc", max_tokens=3).text

        assert await asyncio.to_thread(ask) == "abc"


async def test_a_plain_client_and_a_foreign_authority_get_nowhere(tmp_path: Path) -> None:
    authority, foreign = Authority(tmp_path), Authority(tmp_path, "foreign")
    async with running(config=config(*authority.sign("server"))) as server:
        for tls in (None, Tls(ca=foreign.ca)):
            with pytest.raises(Unavailable):
                await names(server.target, tls)


async def test_mutual_tls_lets_in_only_whom_its_authority_signed(tmp_path: Path) -> None:
    authority, foreign = Authority(tmp_path), Authority(tmp_path, "foreign")
    ours, theirs = authority.sign("client"), foreign.sign("stranger")
    async with running(config=config(*authority.sign("server"), authority.ca)) as server:
        known = Tls(ca=authority.ca, cert=ours[0], key=ours[1])
        assert await names(server.target, known) == ["stub"]
        for tls in (Tls(ca=authority.ca), Tls(ca=authority.ca, cert=theirs[0], key=theirs[1])):
            with pytest.raises(Unavailable):
                await names(server.target, tls)


async def test_a_new_certificate_is_used_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    old = Authority(tmp_path, "old")
    async with running(config=config(*old.sign("server"))) as server:
        assert await names(server.target, Tls(ca=old.ca)) == ["stub"]
        new = Authority(tmp_path, "new")
        cert, key = new.sign("server")
        assert await names(server.target, Tls(ca=new.ca)) == ["stub"]
        with pytest.raises(Unavailable):
            await names(server.target, Tls(ca=old.ca))
        # A broken replacement changes nothing.
        Path(key).write_text("no key")
        assert await names(server.target, Tls(ca=new.ca)) == ["stub"]
        assert Path(cert).exists()


def test_files_that_cannot_work_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.sign("server")
    other_key = authority.sign("other")[1]
    absent, empty = str(tmp_path / "absent.pem"), tmp_path / "empty.pem"
    empty.write_text("")
    wrong = [
        ((absent, key, ""), "--tls-cert .*absent.pem"),
        ((cert, absent, ""), "--tls-key .*absent.pem"),
        ((cert, other_key, ""), "do not go together"),
        ((cert, key, absent), "--tls-client-ca .*absent.pem"),
        ((cert, key, str(empty)), "--tls-client-ca .*empty.pem"),
    ]
    for files, words in wrong:
        with pytest.raises(ConfigError, match=words):
            Server(config(*files))
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        Tls(ca=absent).credentials()
    with pytest.raises(ConfigError, match="go together"):
        Tls(cert=cert).credentials()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "127.example.org"])
def test_beyond_loopback_it_takes_tls_or_insecure(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        ServerConfig(host=host)
    ServerConfig(host=host, insecure=True)
    ServerConfig(host=host, tls_cert="a", tls_key="b")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_needs_neither(host: str) -> None:
    assert ServerConfig(host=host, admin_host=host).shows_reflection(host)


def test_the_admin_listener_beyond_loopback_takes_mutual_tls_or_insecure() -> None:
    tls = {"tls_cert": "a", "tls_key": "b"}
    with pytest.raises(ConfigError, match="admin_host"):
        ServerConfig(admin_host="0.0.0.0", tls_cert="a", tls_key="b")
    ServerConfig(admin_host="0.0.0.0", tls_client_ca="c", **tls)  # type: ignore[arg-type]
    ServerConfig(admin_host="0.0.0.0", insecure=True)


@pytest.mark.parametrize("half", [{"tls_cert": "a"}, {"tls_key": "b"}, {"tls_client_ca": "c"}])
def test_half_of_tls_is_an_error(half: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key"):
        ServerConfig(**half)  # type: ignore[arg-type]
