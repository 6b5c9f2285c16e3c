"""The engine's end of its socket: a connection for every service process that sends it requests.

A client's number is in its first message and in the high bits of its requests' ids. So ids of
several clients never meet, and a step's tokens find their way without a table.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np

from zllm.runtime.frames import Frames
from zllm.runtime.messages import CLIENT_SHIFT, Attach, FromEngine, StepOutput, ToEngine

_decode = msgspec.msgpack.Decoder(ToEngine).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(eq=False)
class _Peer:
    """A connection; its client is known once it has said Attach."""

    frames: Frames
    client: int | None = None


class Clients:
    """Listens at the path from its making on. Not safe for use by several threads at once.

    What a client does not read waits without bound: at most the output of its own requests, and no
    other client's time. It goes out with the next message to it, or at the next poll().
    """

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        """By client."""
        self._inbox: deque[tuple[int, ToEngine]] = deque()
        self._live: dict[int, set[int]] = {}
        """The requests of each attached client that have not ended."""
        self._orphans: list[int] = []

    def poll(self, timeout_ms: int) -> bool:
        """Whether a message waits, after `timeout_ms` at most."""
        deadline = time.monotonic() + timeout_ms / 1000
        left = timeout_ms / 1000
        while not self._inbox:
            for key, events in self._selector.select(left):
                self._serve(key.data, events)
            left = deadline - time.monotonic()
            if left <= 0:
                break
        return bool(self._inbox)

    def receive(self) -> tuple[int, ToEngine]:
        """Who says what; waits for it."""
        while not self._inbox:
            self.poll(1000)
        return self._inbox.popleft()

    def close(self, linger_s: float = 0.0) -> None:
        """Once what waits has gone out, or after so many seconds."""
        if self._listener.fileno() < 0:
            return
        deadline = time.monotonic() + linger_s
        while any(peer.frames.waiting for peer in self._peers.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, events in self._selector.select(left):
                self._serve(key.data, events)
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.frames.close()
        self._listener.close()
        self._selector.close()

    def attach(self, client: int, greeting: FromEngine) -> None:
        """From now on it hears every broadcast. One that comes again has forgotten its requests."""
        self._orphans.extend(self._live.get(client, ()))
        self._live[client] = set()
        self.send(client, greeting)

    def began(self, client: int, request_id: int) -> bool:
        """A request that is the client's, until a step ends it; False where the client has gone,
        for its last messages may come after that."""
        if client not in self._live:
            return False
        self._live[client].add(request_id)
        return True

    def take_orphans(self) -> list[int]:
        """Requests whose client has gone since the last call."""
        orphans, self._orphans = self._orphans, []
        return orphans

    def broadcast(self, message: FromEngine) -> None:
        for client in list(self._live):
            self.send(client, message)

    def publish(self, step: StepOutput) -> None:
        """To each client what the step gave its requests."""
        self._forget_ended(step)
        if len(self._live) == 1:
            self.broadcast(step)
            return
        for client in list(self._live):
            part = _part(step, client)
            if part is not None:
                self.send(client, part)

    def send(self, client: int, message: FromEngine) -> None:
        """A client that is gone leaves its requests as orphans."""
        peer = self._peers.get(client)
        if peer is None:
            return
        waited = peer.frames.waiting
        try:
            peer.frames.write(_encode(message))
        except ConnectionError:
            self._drop(peer)
        else:
            if peer.frames.waiting and not waited:
                self._await(peer, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _serve(self, peer: _Peer | None, events: int) -> None:
        if peer is None:
            self._accept()
            return
        if peer.frames.fileno() < 0:
            return  # closed since the selector looked
        try:
            if events & selectors.EVENT_WRITE:
                peer.frames.flush()
                if not peer.frames.waiting:
                    self._await(peer, selectors.EVENT_READ)
            if events & selectors.EVENT_READ:
                for data in peer.frames.read():
                    self._take(peer, _decode(data))
        except ConnectionError:
            self._drop(peer)

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return  # it left before it was let in
        peer = _Peer(Frames(connected))
        self._selector.register(peer.frames, selectors.EVENT_READ, peer)

    def _take(self, peer: _Peer, message: ToEngine) -> None:
        if isinstance(message, Attach):
            # One that comes again takes the place of what it was.
            last = self._peers.get(message.client)
            if last is not None and last is not peer:
                self._close(last)
            peer.client = message.client
            self._peers[message.client] = peer
        if peer.client is None:
            raise ConnectionError("it has not said who it is")
        self._inbox.append((peer.client, message))

    def _drop(self, peer: _Peer) -> None:
        self._close(peer)
        if peer.client is not None:
            del self._peers[peer.client]
            self._orphans.extend(self._live.pop(peer.client, ()))

    def _close(self, peer: _Peer) -> None:
        self._selector.unregister(peer.frames)
        peer.frames.close()

    def _await(self, peer: _Peer, events: int) -> None:
        self._selector.modify(peer.frames, events, peer)

    def _forget_ended(self, step: StepOutput) -> None:
        ended = np.flatnonzero(np.frombuffer(step.finishes, np.uint8))
        ids = np.frombuffer(step.request_ids, "<i8")[ended].tolist()
        for request_id in [*ids, *(refused.request_id for refused in step.refused)]:
            self._live.get(request_id >> CLIENT_SHIFT, set()).discard(request_id)


def _part(step: StepOutput, client: int) -> StepOutput | None:
    """What of a step is this client's, if anything."""
    ids = np.frombuffer(step.request_ids, "<i8")
    chosen = np.flatnonzero(ids >> CLIENT_SHIFT == client)
    refused = [r for r in step.refused if r.request_id >> CLIENT_SHIFT == client]
    if not (len(chosen) or refused):
        return None
    return StepOutput(
        request_ids=ids[chosen].tobytes(),
        tokens=np.frombuffer(step.tokens, "<i4")[chosen].tobytes(),
        finishes=np.frombuffer(step.finishes, np.uint8)[chosen].tobytes(),
        started=[s for s in step.started if s.request_id >> CLIENT_SHIFT == client],
        refused=refused,
        logprobs={
            index: step.logprobs[old]
            for index, old in enumerate(chosen.tolist())
            if old in step.logprobs
        },
        load=step.load,
    )
