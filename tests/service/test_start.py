"""A model's engine loads while its tokenizer is read: whichever is first, fails, or is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.service.stub_server import STUB, Served, answers, engines, frontends, serving
from tests.service.test_load_unload import (
    STUCK_COMMAND,
    administering,
    is_expected,
    load_request,
    refusal,
    unload_request,
    until_engines,
)
from tests.service.test_processes import copy_model
from zllm.clients.aio import AsyncClient
from zllm.errors import ConfigError, Unavailable
from zllm.runtime.config import EngineConfig
from zllm.runtime.tokenizer import Tokenizer, load_tokenizer
from zllm.service import server
from zllm.service.at_once import both
from zllm.service.config import ServerConfig
from zllm.service.serve import serve
from zllm.v1 import admin_pb2

HOLD = "hold"


def wait_while_held(folder: str | Path) -> None:
    """Until the folder holds no file `hold`."""
    deadline = time.monotonic() + 30
    while Path(folder, HOLD).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def load_when_let(folder: Path) -> Tokenizer:
    wait_while_held(folder)
    return load_tokenizer(folder)


FRONTEND = """
import sys
from tests.service import test_start
from zllm.service import server
from zllm.service.frontend_process import main
server.load_tokenizer = test_start.load_when_let
sys.exit(main())
"""
DEAD = """
import json, os, runpy, sys
line = b""
while not line.endswith(b"\\n"):
    line += os.read(0, 65536)
if json.loads(line)["served_model_name"] == "dead":
    sys.exit(7)
runpy.run_path({stub!r}, run_name="__main__")
"""
DEAD_COMMAND = (sys.executable, "-c", DEAD.format(stub=str(STUB)))
"""Stub engines, of which that of the model `dead` ends at once."""
EITHER_WAY = pytest.mark.parametrize("frontends", [1, 2])


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of engines' sockets and frontends' counts, here and in frontends."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model whose tokenizer is not read before its file `hold` is gone."""
    monkeypatch.setattr(server, "load_tokenizer", load_when_let)
    command = (sys.executable, "-c", FRONTEND)
    monkeypatch.setattr("zllm.service.frontend_handle.FRONTEND_COMMAND", command)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    folder = copy_model(tmp_path)
    (folder / HOLD).touch()
    return folder


def load_of(model: Path, name: str) -> admin_pb2.LoadModelRequest:
    return admin_pb2.LoadModelRequest(name=name, path=str(model))


def starting(
    model: Path,
    lines: list[str],
    frontends: int,
    port: int = 0,
    *,
    before: Path | None = None,
    **settings: str | float,
) -> asyncio.Task[int]:
    """A server that starts with this model, `held`, and with another one, `other`, before it."""
    config = ServerConfig(port=port, admin_port=0, metrics=False, frontends=frontends, **settings)
    models = {"held": model} if before is None else {"other": before, "held": model}
    templates = [
        EngineConfig(model=folder, served_model_name=name, num_kv_blocks=64)
        for name, folder in models.items()
    ]
    command = (sys.executable, str(STUB))
    return asyncio.create_task(
        serve(config, templates, templates[-1], version="test", say=lines.append, command=command)
    )


async def until_listening(lines: list[str]) -> None:
    async with asyncio.timeout(20):
        while not any(line.startswith("listening on ") for line in lines):
            await asyncio.sleep(0.02)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@EITHER_WAY
async def test_a_model_is_served_when_both_its_engine_and_its_tokenizer_are_there(
    model: Path, frontends: int
) -> None:
    port = free_port()
    lines: list[str] = []
    task = starting(model, lines, frontends, port)
    served = Served(task, [f"listening on 127.0.0.1:{port}"])
    await until_engines(1)
    await asyncio.sleep(0.7)  # it has loaded by then, or this test asks less
    async with grpc.aio.insecure_channel(served.target) as channel:
        await channel.channel_ready()
    await served.until_health(False)
    async with AsyncClient(served.target, attempts=1) as client:
        with pytest.raises(Unavailable, match="loading"):
            await client.generate("abc", model="held")
    assert not any(line.startswith("listening on ") for line in lines)
    (model / HOLD).unlink()
    await served.until_health(True)
    await answers(served.target, "held")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await task == 0


@EITHER_WAY
async def test_a_model_that_is_loaded_later_is_served_when_both_are_there(
    model: Path, frontends: int
) -> None:
    async with serving(frontends=frontends) as served, administering(served) as (admin, client):
        loading = asyncio.ensure_future(admin.LoadModel(load_of(model, "held")))
        await until_engines(2)
        code, words = await refusal(admin.UnloadModel(unload_request("held")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "loading" in words
        # A tokenizer that takes its time keeps no other model away.
        await admin.LoadModel(load_request("other"))
        await answers(served.target, "other")
        with pytest.raises(Unavailable, match="loading"):
            await client.generate("abc", model="held")
        (model / HOLD).unlink()
        assert (await loading).model.name == "held"
        await answers(served.target, "held")


@EITHER_WAY
async def test_a_tokenizer_that_cannot_be_read_ends_the_engine_that_loads(
    model: Path, frontends: int, sockets: Path
) -> None:
    (model / "tokenizer.json").write_text("{")
    async with (
        serving(STUCK_COMMAND, frontends=frontends) as served,
        administering(served) as (admin, client),
    ):
        before = set(sockets.iterdir())
        for waits in (True, False):  # at once, the engine's process is hardly there yet
            loading = asyncio.ensure_future(refusal(admin.LoadModel(load_of(model, "stuck"))))
            if waits:
                await until_engines(2)
                (model / HOLD).unlink()
            async with asyncio.timeout(5):
                code, words = await loading
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "tokenizer.json cannot be read" in words
            await until_engines(1)
            assert set(sockets.iterdir()) == before
            assert not await is_expected(client, "stuck")
        await answers(served.target)


@EITHER_WAY
async def test_an_engine_that_fails_waits_for_no_tokenizer(model: Path, frontends: int) -> None:
    async with (
        serving(DEAD_COMMAND, frontends=frontends) as served,
        administering(served) as (admin, client),
    ):
        for _ in range(2):
            async with asyncio.timeout(10):
                code, words = await refusal(admin.LoadModel(load_of(model, "dead")))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "exit code 7" in words
            assert not await is_expected(client, "dead")
        (model / HOLD).unlink()
        await admin.LoadModel(load_of(model, "alive"))
        await answers(served.target, "alive")


@EITHER_WAY
async def test_where_both_fail_the_first_one_says_why(
    model: Path, frontends: int, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "tokenizer.json").write_text("{")
    (model / HOLD).unlink()
    async with (
        serving(DEAD_COMMAND, frontends=frontends) as served,
        administering(served) as (admin, client),
    ):
        for _ in range(3):
            code, words = await refusal(admin.LoadModel(load_of(model, "dead")))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "tokenizer.json" in words or "exit code 7" in words
            assert not await is_expected(client, "dead")
        await until_engines(1)
    assert "never retrieved" not in caplog.text


@EITHER_WAY
async def test_a_caller_that_leaves_ends_the_engine_and_the_reading(
    model: Path, frontends: int
) -> None:
    async with serving(frontends=frontends) as served, administering(served) as (admin, client):
        loading = asyncio.ensure_future(admin.LoadModel(load_of(model, "held")))
        await until_engines(2)
        await asyncio.sleep(0.7)
        loading.cancel()
        await until_engines(1)
        async with asyncio.timeout(5):
            while await is_expected(client, "held"):
                await asyncio.sleep(0.02)
        (model / HOLD).unlink()
        await admin.LoadModel(load_of(model, "held"))
        await answers(served.target, "held")


@EITHER_WAY
async def test_sigterm_waits_for_no_tokenizer(model: Path, frontends: int, sockets: Path) -> None:
    task = starting(model, [], frontends)
    await until_engines(1)
    await asyncio.sleep(0.7)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        assert await task == 0
    assert not engines()
    assert not list(sockets.iterdir())


@EITHER_WAY
async def test_a_drain_waits_for_no_tokenizer(model: Path, frontends: int) -> None:
    async with serving(frontends=frontends) as served, administering(served) as (admin, client):
        loading = asyncio.ensure_future(admin.LoadModel(load_of(model, "held")))
        await until_engines(2)
        async with asyncio.timeout(5):
            await admin.Drain(admin_pb2.DrainRequest())
        (model / HOLD).unlink()
        assert (await loading).model.name == "held"
        with pytest.raises(Unavailable, match="draining"):
            await client.generate("abc", model="held")


@EITHER_WAY
async def test_an_engine_that_is_lost_before_the_tokenizer_is_there_is_replaced(
    model: Path, frontends: int
) -> None:
    async with serving(frontends=frontends) as served, administering(served) as (admin, _):
        loading = asyncio.ensure_future(admin.LoadModel(load_of(model, "held")))
        await until_engines(2)
        await asyncio.sleep(0.7)
        engines()[1].kill()
        await until_engines(1)
        (model / HOLD).unlink()
        async with asyncio.timeout(10):
            assert (await loading).model.name == "held"
        async with asyncio.timeout(10):
            while True:
                with suppress(Unavailable):
                    await answers(served.target, "held")
                    break
                await asyncio.sleep(0.02)


@EITHER_WAY
async def test_a_model_whose_engine_is_lost_before_it_serves_holds_up_no_other(
    model: Path, frontends: int, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    other = copy_model(tmp_path / "second")
    lines: list[str] = []
    task = starting(model, lines, frontends, before=other, restart_backoff=60.0)
    await until_engines(2)
    await asyncio.sleep(0.7)
    engines()[1].kill()
    await until_engines(1)
    (model / HOLD).unlink()
    await until_listening(lines)
    served = Served(task, lines)
    await answers(served.target, "other")
    await served.until_health(True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await task == 0


async def test_an_engine_loads_while_the_frontends_start(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = f"from tests.service import test_start\ntest_start.wait_while_held({str(model)!r})\n"
    command = (sys.executable, "-c", held + FRONTEND)
    monkeypatch.setattr("zllm.service.frontend_handle.FRONTEND_COMMAND", command)
    lines: list[str] = []
    task = starting(model, lines, frontends=2)
    await until_engines(1)
    (model / HOLD).unlink()
    await until_listening(lines)
    await answers(Served(task, lines).target, "held")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await task == 0


async def test_frontends_that_cannot_begin_end_the_engine_that_loads(
    model: Path, tmp_path: Path, sockets: Path
) -> None:
    (model / HOLD).unlink()
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: []")
    with pytest.raises(ConfigError, match="at least one key"):
        await starting(model, [], frontends=2, api_keys=str(keys))
    assert not [*engines(), *frontends()]
    assert not list(sockets.iterdir())


async def test_sigterm_waits_for_no_frontend(
    model: Path, monkeypatch: pytest.MonkeyPatch, sockets: Path
) -> None:
    stuck = (sys.executable, "-c", "import sys; sys.stdin.read()  # zllm.service.frontend_process")
    monkeypatch.setattr("zllm.service.frontend_handle.FRONTEND_COMMAND", stuck)
    task = starting(model, [], frontends=2)
    await until_engines(1)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(8):
        assert await task == 0
    assert not [*engines(), *frontends()]
    assert not list(sockets.iterdir())


async def test_sigterm_ends_frontends_that_do_not_end_by_themselves(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = (sys.executable, "-c", "import time; time.sleep(40)  # zllm.service.frontend_process")
    monkeypatch.setattr("zllm.service.frontend_handle.FRONTEND_COMMAND", stuck)
    monkeypatch.setattr("zllm.service.frontend_handle.STOP_S", 0.5)
    task = starting(model, [], frontends=2)
    await until_engines(1)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(8):
        assert await task == 0
    assert not [*engines(), *frontends()]


async def after(seconds: float, result: int) -> int:
    await asyncio.sleep(seconds)
    return result


async def failing(seconds: float, word: str) -> int:
    await asyncio.sleep(seconds)
    raise ConfigError(word)


async def test_both_give_their_results_in_order() -> None:
    assert await both(after(0.02, 1), after(0.0, 2)) == (1, 2)


async def slow(ended: asyncio.Event) -> None:
    """Never done by itself, and takes a moment to clean up."""
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        ended.set()


async def test_the_first_failure_ends_the_other_and_is_raised_when_that_has_ended() -> None:
    ended = asyncio.Event()
    with pytest.raises(ConfigError, match="first"):
        await both(slow(ended), failing(0.0, "first"))
    assert ended.is_set()
    with pytest.raises(ConfigError, match="first"):
        await both(failing(0.01, "second"), failing(0.0, "first"))


async def test_who_leaves_both_leaves_neither_running() -> None:
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(both(after(60, 1), after(60, 2)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert asyncio.all_tasks() == before


async def test_what_is_left_cleans_up_in_peace() -> None:
    ended = asyncio.Event()
    task = asyncio.create_task(both(slow(ended), after(10.0, 1)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
