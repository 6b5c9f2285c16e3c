"""The descriptor of a ZeroMQ socket tells of changes only: no message may wait unread for one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq

from zllm.service.engine_socket import MAX_MESSAGES, EngineSocket


class Peer:
    """The engine's end, used from the test's own thread."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.set(zmq.RCVTIMEO, 5000)
        self.socket.bind(address)


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
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Peer, EngineSocket, Heard]]:
    address = f"ipc://{tmp_path}/engine.sock"
    peer, socket = Peer(address), EngineSocket(address, b"test")
    yield peer, socket, Heard()
    socket.close()
    peer.context.destroy(linger=0)


def numbers(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, start + count)]


async def test_what_came_before_anyone_listened_is_heard_in_order(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    for message in numbers(10):
        peer.socket.send(message)
    await asyncio.sleep(0.1)
    assert not heard.all
    socket.listen(heard)
    await heard.until(10)
    assert heard.all == numbers(10)


async def test_messages_that_wait_while_the_loop_is_busy_come_together(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    socket.listen(heard)
    peer.socket.send(b"first")
    await heard.until(1)
    for message in numbers(100):
        peer.socket.send(message)
    time.sleep(0.1)  # the loop is busy
    await heard.until(101)
    assert heard.all == [b"first", *numbers(100)]
    assert len(heard.portions) < 10


async def test_a_burst_beyond_one_portion_is_heard_to_its_end(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    socket.listen(heard)
    count = 3 * MAX_MESSAGES + 7
    for message in numbers(count):
        peer.socket.send(message)
    await heard.until(count)
    assert heard.all == numbers(count)
    assert max(map(len, heard.portions)) <= MAX_MESSAGES


async def test_a_send_does_not_swallow_the_sign_of_a_message_that_waits(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    socket.listen(heard)
    for turn in range(200):
        peer.socket.send(b"%d" % turn)
        arrived(socket)
        socket.send(b"thanks")
        await heard.until(turn + 1)
    assert heard.all == numbers(200)


async def test_who_hears_may_send_and_is_not_called_from_within(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    inside = False

    def answer(messages: list[bytes]) -> None:
        nonlocal inside
        assert not inside
        inside = True
        for message in messages:
            if len(heard.all) < 50:
                peer.socket.send(b"more")
            socket.send(message)
        inside = False

    heard.then = answer
    socket.listen(heard)
    peer.socket.send(b"one")
    await heard.until(50)
    assert [peer.socket.recv() for _ in range(50)] == heard.all[:50]


async def test_what_is_sent_without_a_reader_waits_in_order(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, _ = pair
    sent = numbers(5000)
    for message in sent:
        socket.send(message)
    assert [peer.socket.recv() for _ in sent] == sent


async def test_nothing_is_heard_after_close_and_sends_are_dropped(
    pair: tuple[Peer, EngineSocket, Heard],
) -> None:
    peer, socket, heard = pair
    socket.listen(heard)
    for message in numbers(MAX_MESSAGES + 1):
        peer.socket.send(message)
    heard.then = lambda messages: socket.close()
    await heard.until(1)
    socket.send(b"dropped")
    socket.close()
    await asyncio.sleep(0.05)
    assert len(heard.portions) == 1


def arrived(socket: EngineSocket) -> None:
    """Waits for a message while the loop stands still, and takes the descriptor's sign of it."""
    assert socket._socket.poll(5000)
