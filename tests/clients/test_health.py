"""`zllm health` and what is beneath it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.service.certificates import Authority
from tests.service.harness import running
from zllm.cli import main
from zllm.clients.health import ask
from zllm.errors import Unavailable, UnknownModel
from zllm.service.config import ServerConfig


async def test_it_ends_with_0_while_the_server_serves_and_with_1_in_a_drain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with running() as server:
        for arguments in ([], ["--service", "model/stub"]):
            command = ["health", "--target", server.target, *arguments]
            assert await asyncio.to_thread(main, command) == 0
            assert capsys.readouterr().out == "SERVING\n"
        assert await asyncio.to_thread(main, [*command, "--service", "model/zz"]) == 1
        assert "service: 'model/zz' is not known" in capsys.readouterr().err
        await server.server.drain(0.0)
        assert await asyncio.to_thread(main, command) == 1
        assert capsys.readouterr().out == "NOT_SERVING\n"


async def test_it_goes_through_tls_and_knows_no_strangers(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.sign("server")
    config = ServerConfig(port=0, admin_port=0, tls_cert=cert, tls_key=key)
    async with running(config=config) as server:
        command = ["health", "--target", server.target, "--tls-ca", authority.ca]
        assert await asyncio.to_thread(main, command) == 0
        with pytest.raises(Unavailable):
            await asyncio.to_thread(ask, server.target)
    async with running() as server:
        with pytest.raises(UnknownModel):
            await asyncio.to_thread(ask, server.target, "nobody")
