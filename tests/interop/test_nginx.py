"""nginx with deploy/nginx/nginx.conf between client and server."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.service.certificates import Authority
from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.clients.aio import AsyncClient
from zllm.clients.credentials import Tls
from zllm.errors import InvalidRequest, Unavailable

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONF = Path(__file__).parents[2] / "deploy/nginx/nginx.conf"
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def behind_nginx(server: Harness, folder: Path) -> AsyncIterator[AsyncClient]:
    """A client of the server through nginx, which runs from `folder`."""
    authority, port = Authority(folder), free_port()
    authority.sign("server")
    conf = CONF.read_text()
    for ours, theirs in (
        ("127.0.0.1:50051", server.target),
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("worker_processes auto", "worker_processes 1"),
        ("http {", "http { access_log off;" + "".join(
            f" {name}_temp_path {folder}/{name};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )),
    ):  # fmt: skip
        assert conf.count(ours) == 1, f"{CONF} has not one {ours!r}"
        conf = conf.replace(ours, theirs)
    (folder / "nginx.conf").write_text(conf)
    command = [NGINX or "", "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log")]
    command += ["-g", f"daemon off; pid {folder}/nginx.pid;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        async with AsyncClient(f"127.0.0.1:{port}", attempts=1, tls=Tls(ca=authority.ca)) as client:
            await until_listening(port, process)
            yield client
    finally:
        process.terminate()
        process.wait(10)


async def until_listening(port: int, process: subprocess.Popen[str]) -> None:
    async with asyncio.timeout(10):
        while True:
            assert process.poll() is None, process.communicate()[1]
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


async def test_answers_and_errors_come_through_as_they_are(tmp_path: Path) -> None:
    async with running() as server, behind_nginx(server, tmp_path) as client:
        assert (await client.generate("abc", max_tokens=6)).text == "abcabc"
        assert [model.name for model in await client.models()] == ["stub"]
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("abc", top_p=7.0)
        assert caught.value.field == "sampling.top_p"


async def test_deltas_are_not_held_back_and_a_cancel_reaches_the_engine(tmp_path: Path) -> None:
    async with (
        running(StubEngine(step_s=0.02)) as server,
        behind_nginx(server, tmp_path) as client,
    ):
        stream = client.stream("abc", ignore_eos=True)
        deltas = aiter(stream)
        for _ in range(5):
            await anext(deltas)
        # Its first words are here while it still runs.
        assert (await server.load()).running_requests == 1
        stream.cancel()
        await server.until_idle()


async def test_three_hundred_streams_go_at_once_on_one_connection(tmp_path: Path) -> None:
    engine = StubEngine(step_s=0.02, num_blocks=10_000, max_running=300, max_queued=300)
    async with running(engine) as server, behind_nginx(server, tmp_path) as client:
        tasks = [asyncio.create_task(client.generate("abc", max_tokens=200)) for _ in range(300)]
        await server.until(lambda load: load.running_requests == 300, "they wait in between")
        for task in tasks:
            assert (await task).text == ("abc" * 100)[:200]
        await server.until_idle()


async def test_a_large_prompt_goes_through(tmp_path: Path) -> None:
    async with running() as server, behind_nginx(server, tmp_path) as client:
        # Ids of two bytes: more than the mebibyte that nginx lets in by default.
        answer = await client.generate([200] * 900_000, max_tokens=1, truncate_prompt_tokens=9)
        assert answer.usage.prompt_tokens == 9


async def test_a_server_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    async with running() as server, behind_nginx(server, tmp_path) as client:
        assert (await client.generate("abc", max_tokens=1)).text == "a"
        await server.server.stop(0.0)
        with pytest.raises(Unavailable, match="no zllm server answers"):
            await client.generate("abc", max_tokens=1)
