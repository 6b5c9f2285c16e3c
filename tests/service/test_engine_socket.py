"""The service's end of the socket: nothing is lost, nothing waits, and close() is the end."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.runtime.framed import Framed, Listening
from zllm.service import engine_socket
from zllm.service.engine_socket import EngineSocket


class Heard:
    """What the socket gave, and in which portions."""

    def __init__(self) -> None:
        self.portions: list[list[bytes]] = []
        self.then: Callable[[list[bytes]], None] = lambda messages: None

    def __call__(self, messages: list[bytes]) -> None:
        self.portions.append(messages)
        self.then(messages)

    @property
    def all(self) -> list[bytes]:
        return [message for portion in self.portions for message in portion]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.all) < count:
                await asyncio.sleep(0.001)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Framed, EngineSocket, Heard]]:
    """The engine's end, used from the test's own thread, and the service's, open."""
    path = str(tmp_path / "engine.sock")
    engine, socket, heard = Listening(path), EngineSocket(path), Heard()
    socket.open(heard)
    yield engine.framed, socket, heard
    socket.close()
    engine.close()


def numbers(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


async def test_it_connects_once_the_engine_listens_and_says_what_waited(tmp_path: Path) -> None:
    path = str(tmp_path / "engine.sock")
    socket, heard = EngineSocket(path), Heard()
    socket.send(b"before it was opened")
    socket.open(heard)
    socket.send(b"before the engine listened")
    await asyncio.sleep(0.05)
    engine = Listening(path)
    async with asyncio.timeout(5):
        framed = await asyncio.to_thread(lambda: engine.framed)
    assert framed.recv() == b"before it was opened"
    assert framed.recv() == b"before the engine listened"
    framed.send(b"hello")
    await heard.until(1)
    socket.close()
    engine.close()


async def test_it_tries_again_where_descriptors_run_out_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, connect, tries = str(tmp_path / "engine.sock"), engine_socket._connected, []

    def scarce(path: str) -> object:
        tries.append(path)
        if len(tries) <= 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return connect(path)

    monkeypatch.setattr(engine_socket, "_connected", scarce)
    engine, socket, heard = Listening(path), EngineSocket(path), Heard()
    socket.open(heard)
    async with asyncio.timeout(5):
        framed = await asyncio.to_thread(lambda: engine.framed)
    framed.send(b"hello")
    await heard.until(1)
    assert len(tries) == 4
    socket.close()
    engine.close()


async def test_what_will_not_pass_is_raised_at_once(tmp_path: Path) -> None:
    socket = EngineSocket(str(tmp_path / ("x" * 200)))
    with pytest.raises(OSError, match="too long"):
        socket.open(Heard())
    socket.close()


async def test_messages_that_wait_while_the_loop_is_busy_come_together(
    pair: tuple[Framed, EngineSocket, Heard],
) -> None:
    peer, _, heard = pair
    for message in numbers(100):
        peer.send(message)
    time.sleep(0.01)  # the loop is busy
    await heard.until(100)
    assert heard.portions == [numbers(100)]


async def test_a_burst_is_heard_to_its_end(pair: tuple[Framed, EngineSocket, Heard]) -> None:
    peer, _, heard = pair
    sent = [bytes(50_000) + b"%d" % number for number in range(100)]
    await asyncio.to_thread(lambda: [peer.send(message) for message in sent])
    await heard.until(100)
    assert heard.all == sent


async def test_who_hears_may_send_and_is_not_called_from_within(
    pair: tuple[Framed, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    inside = False

    def answer(messages: list[bytes]) -> None:
        nonlocal inside
        assert not inside
        inside = True
        for message in messages:
            if len(heard.all) < 50:
                peer.send(b"more")
            socket.send(message)
        inside = False

    heard.then = answer
    peer.send(b"one")
    await heard.until(50)
    assert [peer.recv() for _ in range(50)] == heard.all[:50]


async def test_what_the_engine_does_not_read_waits_in_order(
    pair: tuple[Framed, EngineSocket, Heard],
) -> None:
    peer, socket, _ = pair
    sent = [bytes(1000) + number for number in numbers(5000)]
    for message in sent:
        socket.send(message)
    assert await asyncio.to_thread(lambda: [peer.recv() for _ in sent]) == sent
    socket.send(b"and goes on")
    assert peer.recv() == b"and goes on"


async def test_an_engine_that_has_gone_costs_nothing(
    pair: tuple[Framed, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    peer.send(b"last words")
    peer.close()
    await heard.until(1)
    await asyncio.sleep(0.01)
    socket.send(b"dropped")
    assert heard.all == [b"last words"]


async def test_nothing_is_heard_after_close_and_sends_are_dropped(
    pair: tuple[Framed, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    heard.then = lambda messages: socket.close()
    peer.send(b"heard")
    await heard.until(1)
    socket.send(b"dropped")
    socket.close()
    with pytest.raises(ConnectionError):
        peer.recv()
    assert heard.all == [b"heard"]


async def test_it_can_be_closed_before_the_engine_ever_listened(tmp_path: Path) -> None:
    socket = EngineSocket(str(tmp_path / "engine.sock"))
    socket.send(b"dropped")
    socket.open(Heard())
    socket.close()
    engine = Listening(str(tmp_path / "engine.sock"))
    await asyncio.sleep(0.1)
    engine._listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        engine._listener.accept()
    engine.close()
