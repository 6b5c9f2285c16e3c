"""Service processes share an engine: each hears of its own requests, and every heartbeat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.runtime.framed import Framed
from zllm.runtime.clients import Clients
from zllm.runtime.messages import (
    CLIENT_SHIFT,
    AddRequest,
    Attach,
    EngineFailed,
    FromEngine,
    Heartbeat,
    Load,
    RequestRefused,
    RequestStarted,
    Sampling,
    Shutdown,
    StepOutput,
    Stopping,
    ToEngine,
    TokenLogprobs,
)

GREETING = EngineFailed("a message as good as any")


class Peer:
    """A service's end of the socket."""

    def __init__(self, path: str, number: int) -> None:
        self.number = number
        self.socket = Framed.to(path)

    def send(self, message: ToEngine) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def heard(self) -> FromEngine:
        return msgspec.msgpack.decode(self.socket.recv(), type=FromEngine)

    def request(self, count: int) -> int:
        return (self.number << CLIENT_SHIFT) + count


class Shared:
    """An engine's end of the socket, and two services."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.clients = Clients(path)
        self.peers = [Peer(path, number) for number in (1, 70_000)]
        for peer in self.peers:
            peer.send(Attach(peer.number))
            assert self.take() == (peer.number, Attach(peer.number))
            self.clients.attach(peer.number, GREETING)
            assert peer.heard() == GREETING

    def take(self) -> tuple[int, ToEngine]:
        assert self.clients.poll(5000)
        return self.clients.receive()

    def begin(self, peer: Peer, count: int) -> int:
        """The peer's request of that count runs."""
        request_id = peer.request(count)
        peer.send(AddRequest(request_id, b"\1\0\0\0", Sampling(), Stopping(max_tokens=9)))
        number, message = self.take()
        assert isinstance(message, AddRequest)
        assert self.clients.began(number, message.request_id)
        return request_id

    def until_orphans(self) -> list[int]:
        for _ in range(500):
            self.clients.broadcast(Heartbeat(Load()))
            orphans = self.clients.take_orphans()
            if orphans:
                return orphans
            self.clients.poll(10)
        raise AssertionError("its end was never noticed")


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    shared = Shared(str(tmp_path / "engine.sock"))
    yield shared
    shared.clients.close()
    for peer in shared.peers:
        peer.socket.close()


def step(*entries: tuple[int, int, int], **lists: list[object]) -> StepOutput:
    """Of (request id, token, finish)."""
    ids, tokens, finishes = zip(*entries, strict=True) if entries else ((), (), ())
    settings = {"started": [], "refused": [], "logprobs": {}, "load": Load(steps=7)} | lists
    return StepOutput(
        np.array(ids, "<i8").tobytes(),
        np.array(tokens, "<i4").tobytes(),
        bytes(finishes),
        **settings,
    )


def test_a_step_is_shared_out_by_request(shared: Shared) -> None:
    one, other = shared.peers
    a, b = shared.begin(one, 1), shared.begin(other, 1)
    c = shared.begin(one, 2)
    logprobs = [TokenLogprobs(-float(n), 1, [], []) for n in range(3)]
    shared.clients.publish(
        step(
            (a, 10, 0), (b, 20, 2), (c, 30, 0),
            started=[RequestStarted(b, 0, 0.5), RequestStarted(c, 16, 0.1)],
            refused=[RequestRefused(other.request(9), "the queue is full")],
            logprobs={1: logprobs[1], 2: logprobs[2]},
        )
    )  # fmt: skip
    assert one.heard() == step(
        (a, 10, 0), (c, 30, 0), started=[RequestStarted(c, 16, 0.1)], logprobs={1: logprobs[2]}
    )
    assert other.heard() == step(
        (b, 20, 2),
        started=[RequestStarted(b, 0, 0.5)],
        refused=[RequestRefused(other.request(9), "the queue is full")],
        logprobs={0: logprobs[1]},
    )


def test_who_has_no_part_in_a_step_hears_the_next_heartbeat_only(shared: Shared) -> None:
    one, other = shared.peers
    shared.clients.publish(step((shared.begin(one, 1), 10, 0)))
    shared.clients.broadcast(Heartbeat(Load(steps=8)))
    assert other.heard() == Heartbeat(Load(steps=8))
    assert isinstance(one.heard(), StepOutput)
    assert one.heard() == Heartbeat(Load(steps=8))


def test_requests_of_a_client_that_has_gone_are_orphans_and_ended_ones_are_not(
    shared: Shared,
) -> None:
    one, other = shared.peers
    kept = [shared.begin(one, 1), shared.begin(other, 1)]
    ended, refused = shared.begin(other, 2), shared.begin(other, 3)
    shared.clients.publish(
        step((kept[0], 1, 0), (ended, 1, 2), refused=[RequestRefused(refused, "no")])
    )
    other.socket.close()
    assert shared.until_orphans() == [kept[1]]
    assert not shared.clients.take_orphans()
    assert not shared.clients.began(other.number, other.request(4))
    shared.clients.publish(step((kept[0], 2, 0), (kept[1], 2, 0)))
    messages = [one.heard()]
    while not isinstance(messages[-1], StepOutput) or messages[-1].tokens[0] != 2:
        messages.append(one.heard())


def test_a_client_that_comes_again_leaves_its_old_requests_as_orphans(shared: Shared) -> None:
    one, other = shared.peers
    left, kept = shared.begin(one, 1), shared.begin(other, 1)
    again = Peer(shared.path, one.number)
    again.send(Attach(one.number))
    assert shared.take() == (one.number, Attach(one.number))
    shared.clients.attach(one.number, GREETING)
    assert again.heard() == GREETING
    assert shared.clients.take_orphans() == [left]
    shared.clients.publish(step((kept, 1, 0)))
    assert isinstance(other.heard(), StepOutput)
    again.socket.close()


def test_a_client_that_comes_again_takes_the_place_of_its_old_connection(shared: Shared) -> None:
    before = shared.peers[0]
    again = Peer(shared.path, before.number)
    again.send(Attach(before.number))
    assert shared.take() == (before.number, Attach(before.number))
    shared.clients.attach(before.number, GREETING)
    assert again.heard() == GREETING
    with pytest.raises(ConnectionError):
        before.heard()
    before.socket.close()  # its end is not the new one's
    assert not shared.clients.poll(50)
    shared.clients.send(before.number, GREETING)
    assert again.heard() == GREETING
    again.socket.close()


def test_a_client_that_does_not_read_holds_up_nobody_and_misses_nothing(shared: Shared) -> None:
    one, other = shared.peers
    stalled, live = shared.begin(one, 1), shared.begin(other, 1)
    text = "x" * 2000
    for count in range(500):
        refused = [RequestRefused(one.request(9), text)]
        shared.clients.publish(step((stalled, count, 0), (live, count, 0), refused=refused))
        assert other.heard() == step((live, count, 0))
    for count in range(500):
        shared.clients.poll(0)
        heard = one.heard()
        assert isinstance(heard, StepOutput)
        assert heard.tokens == np.array([count], "<i4").tobytes()


def test_who_does_not_say_who_it_is_is_shown_out(shared: Shared) -> None:
    stranger = Framed.to(shared.path)
    stranger.send(msgspec.msgpack.encode(Shutdown()))
    assert not shared.clients.poll(50)
    with pytest.raises(ConnectionError):
        stranger.recv()
    stranger.close()


def test_last_words_go_out_before_the_socket_closes(shared: Shared) -> None:
    one, other = shared.peers
    text = "x" * 2_000_000
    shared.clients.send(one.number, EngineFailed(text))
    closing = threading.Thread(target=shared.clients.close, args=(5.0,))
    closing.start()
    assert one.heard() == EngineFailed(text)
    closing.join()
    with pytest.raises(ConnectionError):
        other.heard()
